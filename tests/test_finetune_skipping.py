"""recipes/finetune.py: steps that spike or are not finite are left out, and nothing else is."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_finetune_guards import Changed, assert_equal, run, weights

from bmtk.errors import Diverged, exit_code_of
from bmtk.training import callbacks
from bmtk.training import trainer as trainer_module

SETTINGS = ["--eval_strategy", "no", "--hidden_dropout", "0.1", "--logging_steps", "1", "--skip_test"]
WORDS = ("sun", "rain", "snow", "wind")
ROWS, BATCH = 40, 4
TEXT = ["--tokenizer", "bytes", "--batch_size", str(BATCH), "--nonfinite", "skip", "--rollback_after", "2"]
STEPS = ["--max_steps", "12", "--save_steps", "2"]
MARK = "#"  # of rows that break a step


def lines(folder: Path) -> list[dict]:
    """Of history.jsonl, without what a clock has measured."""
    clock = {"seconds", "tokens_per_second"}
    found = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in found]


def write_rows(folder: Path, *, marked=(), left_out=()) -> list[str]:
    """Rows in a folder, and the options that read them in their order."""
    for split, first, count in (("train", 0, ROWS), ("validation", 100, 4)):
        kept = [row for row in range(first, first + count) if row not in left_out]
        rows = [{"text": f"{WORDS[row % 4]} {row}{MARK * (row in marked)}", "label": WORDS[row % 2]} for row in kept]
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [*SETTINGS, *TEXT, "--dataset", str(folder), "--train_sampling_strategy", "sequential"]


@pytest.fixture
def built(monkeypatch):
    """A function that has `change(trainer)` look at every trainer."""
    build = trainer_module.build_trainer

    def use(change) -> None:
        def changed(*args, **kwargs):
            trainer = build(*args, **kwargs)
            change(trainer)
            return trainer

        monkeypatch.setattr(trainer_module, "build_trainer", changed)

    yield use
    monkeypatch.undo()


class Marked:
    """A trainer's loss, not finite for a batch with a marked row."""

    def __init__(self, trainer):
        self.inner = trainer.loss
        (self.mark,) = trainer.processing_class(MARK, add_special_tokens=False)["input_ids"]

    def __call__(self, batch, *args):
        self.inner.model, loss = self.model, self.inner(batch, *args)
        return loss * math.nan if (batch["input_ids"] == self.mark).any() else loss


def break_marked(trainer) -> None:
    trainer.loss = Marked(trainer)


def without_update(number: int, patch: pytest.MonkeyPatch) -> None:
    """Have AdamW do nothing when it is called for the time `number`, counted from 1."""
    step, calls = torch.optim.AdamW.step, []

    def counted(self, *args, **kwargs):
        calls.append(1)
        return None if len(calls) == number else step(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", counted)


@pytest.mark.parametrize(
    ("change", "at", "steps", "options"),
    [
        (lambda loss: loss * 1e4, 67, 70, []),
        (lambda loss: loss + math.nan, 3, 6, ["--nonfinite", "skip"]),
        (lambda loss: loss + 1e25, 3, 6, ["--nonfinite", "skip"]),
    ],
    ids=["spike", "nan", "out of range"],
)
def test_a_skipped_step_is_one_whose_update_alone_was_left_out(
    change, at, steps, options, built, monkeypatch, caplog, tmp_path
):
    settings = [*SETTINGS, "--max_steps", str(steps), "--save_steps", "0", *options]
    with monkeypatch.context() as patch:
        without_update(at, patch)
        expected = run(tmp_path / "expected", *settings, "--spike_sigma", "0")

    def scale(trainer):
        trainer.loss = Changed(trainer, change, at)

    built(scale)
    folder = run(tmp_path / "run", *settings)
    assert_equal(weights(folder), weights(expected))
    assert lines(folder) == [line for line in lines(expected) if line["step"] != at]
    (bundle,) = (folder / "bad_steps").iterdir()
    assert bundle.name == f"step-{at:08d}-data-{at:08d}"
    event = json.loads((bundle / "event.json").read_text())
    assert event["what"] == ("spike" if at == 67 else "not finite")
    assert load_file(bundle / "process-0.safetensors")["rows"].shape == (16,)
    assert caplog.text.count(f"step {at}: loss ") == 1
    assert "this update was not applied" in caplog.text
    assert "the step was applied" not in caplog.text


def test_a_skipped_step_leaves_statistics_and_averages_as_they_were(built, tmp_path):
    def break_step(trainer):
        trainer.loss = Changed(trainer, lambda loss: loss + math.nan, 2)

    built(break_step)
    options = ["--task", "image_classification", "--model_type", "bm_cnn", "--norm_type", "batch_norm"]
    settings = ["--max_steps", "4", "--eval_strategy", "no", "--save_steps", "4", "--nonfinite", "skip", "--skip_test"]
    folder = run(tmp_path / "run", *options, *settings, "--ema_decay", "0.5")
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    counts = [value for name, value in weights(checkpoint).items() if name.endswith("num_batches_tracked")]
    assert counts
    assert set(map(int, counts)) == {3}
    assert load_file(checkpoint / "averages.safetensors")["num_updates"] == 3


def test_a_row_of_bad_steps_is_as_if_its_rows_had_not_been_there(built, caplog, tmp_path):
    """Over the end of an epoch, which has fewer steps then."""
    marked = range(5 * BATCH, 7 * BATCH)
    expected = run(tmp_path / "expected", *write_rows(tmp_path / "without", left_out=marked), *STEPS)
    built(break_marked)
    folder = run(tmp_path / "run", *write_rows(tmp_path / "with", marked=marked), *STEPS)
    assert_equal(weights(folder), weights(expected))
    drop = [{key: value for key, value in line.items() if key != "epoch"} for line in lines(folder)]
    assert drop == [{key: value for key, value in line.items() if key != "epoch"} for line in lines(expected)]
    assert "steps 6 to 7 were not applied: going back to the checkpoint after step 4; the rows of steps 6 to 7" in (
        caplog.text
    )
    names = ["rollback-00000006-data-00000006.json", "step-00000006-data-00000006", "step-00000007-data-00000007"]
    assert sorted(path.name for path in (folder / "bad_steps").iterdir()) == names
    kept = json.loads((folder / "checkpoints" / "checkpoint-12" / "guard.json").read_text())
    assert (kept["left_out"], kept["failed_at"], kept["skipped"]) == ([5, 6], 5, [])


def test_a_run_that_is_stopped_after_it_went_back_ends_with_the_same_bytes(built, tmp_path, monkeypatch):
    marked = range(5 * BATCH, 7 * BATCH)
    options = [*write_rows(tmp_path / "with", marked=marked), *STEPS]
    expected = run(tmp_path / "expected", *write_rows(tmp_path / "without", left_out=marked), *STEPS)

    def break_off(self, args, state, control, **kwargs):
        if state.global_step == 10:
            raise KeyboardInterrupt

    built(break_marked)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.RecordHistory, "on_save", break_off, raising=False)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", *options)
    assert_equal(weights(run(tmp_path / "run", *options)), weights(expected))


def test_the_rows_of_each_step_are_those_that_are_left_in_their_order(built, tmp_path):
    """The last two steps of each epoch, the second of which is short, are left out one epoch after another."""
    rows_of: dict[int, list[int]] = {}

    class Looking(Marked):
        def __init__(self, trainer):
            super().__init__(trainer)
            self.trainer, self.step = trainer, -1

        def __call__(self, batch, *args):
            if self.step != self.trainer.state.global_step:
                self.step = self.trainer.state.global_step
                rows_of[self.step] = []
            texts = self.trainer.processing_class.batch_decode(batch["input_ids"])
            rows_of[self.step] += [int(re.search(r"\d+", text)[0]) for text in texts]
            return super().__call__(batch, *args)

    def look(trainer):
        trainer.loss = Looking(trainer)

    built(look)
    options = write_rows(tmp_path / "rows", marked=range(32, 38), left_out=(38, 39))
    run(tmp_path / "run", *options, "--micro_batch_size", "2", "--max_steps", "24", "--save_steps", "2")
    epoch = [list(range(38))[first : first + BATCH] for first in range(0, 38, BATCH)]
    assert [rows_of[step] for step in range(24)] == 3 * epoch[:8]


def test_the_bundle_names_the_rows_of_a_shuffled_step(built, tmp_path):
    options = write_rows(tmp_path / "rows", marked=[17])
    built(break_marked)
    steps = ["--max_steps", "20", "--save_steps", "0", "--micro_batch_size", "2"]
    folder = run(tmp_path / "run", *options[: options.index("--train_sampling_strategy")], *steps)
    bundles = [load_file(path / "process-0.safetensors") for path in sorted((folder / "bad_steps").iterdir())]
    assert [bundle["epochs"].tolist() for bundle in bundles] == [[0] * BATCH, [1] * BATCH]
    rows = [bundle["rows"].tolist() for bundle in bundles]
    assert all(17 in each and len(set(each)) == BATCH for each in rows)
    assert rows[0] != rows[1]


@pytest.mark.parametrize("save_steps", [0, 2])
def test_where_going_back_does_not_help_the_run_ends_with_its_weights_saved(save_steps, built, tmp_path):
    """Without a checkpoint at once; with one, when the next steps cannot be applied either."""
    options = write_rows(tmp_path / "rows", marked=range(5 * BATCH, 9 * BATCH))
    built(break_marked)
    with pytest.raises(Diverged, match=r"step 7: these are 2 such steps in a row, so .*are saved whole in ") as found:
        run(tmp_path / "run", *options, "--max_steps", "12", "--save_steps", str(save_steps))
    assert ("after going back from step 6 did not help" in str(found.value)) == (save_steps > 0)
    assert exit_code_of(found.value) == 65
    saved = tmp_path / "run" / "checkpoints" / "checkpoint-7"
    assert all(value.isfinite().all() for value in weights(saved).values())
