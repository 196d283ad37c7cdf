"""recipes/finetune.py: a step that is not finite is never applied, hidden or saved, and costs no step before it."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmtk.errors import UserError
from bmtk.training import callbacks
from bmtk.training import trainer as trainer_module
from bmtk.training.manifest import damages
from recipes import finetune

ROOT = Path(__file__).parent.parent
SETTINGS = ["--max_steps", "8", "--eval_strategy", "no", "--hidden_dropout", "0.1", "--logging_steps", "1"]
AT_THE_END = [*SETTINGS, "--save_steps", "0"]


def run(folder: Path, *argv) -> Path:
    with contextlib.chdir(ROOT):
        finetune.main(["--preset", "smoke", "--output_dir", str(folder), "--disable_tqdm", "true", *map(str, argv)])
    return folder


class Changed:
    """A trainer's loss, after `change(loss)` at the step `at`, counted from 1."""

    def __init__(self, trainer, change, at: int):
        self.trainer, self.inner, self.change, self.at = trainer, trainer.loss, change, at

    def __call__(self, *args):
        self.inner.model, loss = self.model, self.inner(*args)
        return self.change(loss) if self.trainer.state.global_step + 1 == self.at else loss


@pytest.fixture
def changing(monkeypatch):
    """A function that makes all runs change their loss, and have the gradient scaler `scaler`."""
    build = trainer_module.build_trainer

    def change(change=None, *, at: int = 8, scaler=None) -> None:
        def changed(*args, **kwargs):
            trainer = build(*args, **kwargs)
            trainer.loss = Changed(trainer, change, at) if change else trainer.loss
            trainer.accelerator.scaler = scaler
            return trainer

        monkeypatch.setattr(trainer_module, "build_trainer", changed)

    yield change
    monkeypatch.undo()


def with_gradient(factor: float):
    def change(loss: torch.Tensor) -> torch.Tensor:
        loss.register_hook(lambda gradient: gradient * factor)
        return loss

    return change


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert not [name for name, value in theirs.items() if not torch.equal(value, ours[name])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run without a fault, whose every step was saved."""
    return run(tmp_path_factory.mktemp("whole") / "run", *SETTINGS, "--save_steps", "1", "--save_total_limit", "9")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda loss: loss + math.nan, r"the loss is not finite, so it was not applied \(loss nan, "),
        (lambda loss: loss + math.inf, r"the loss is not finite, so it was not applied \(loss inf, "),
        (lambda loss: loss + 1e25, r"the loss is out of range, so it was not applied \(loss 1e\+25, "),
        (with_gradient(math.inf), r"the gradient is not finite, so it was not applied \(loss 0.*, gradient norm "),
        (with_gradient(1e25), r"the gradient is not finite, so it was not applied \(loss 0.*, gradient norm inf\)"),
    ],
    ids=["nan", "inf", "1e25", "infinite gradient", "gradient without a norm"],
)
def test_the_weights_before_a_broken_last_step_are_saved_and_gone_on_from(change, reason, whole, changing, tmp_path):
    folder = tmp_path / "run"
    saved = folder / "checkpoints" / "checkpoint-7"
    changing(change)
    with pytest.raises(UserError, match=f"step 8: {reason}.* saved whole in {saved}; lower learning_rate=0.005, or"):
        run(folder, *AT_THE_END)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-7"]
    assert damages(saved) == []
    assert not (folder / "config.json").exists()
    assert_equal(weights(saved), weights(whole / "checkpoints" / "checkpoint-7"))
    changing()
    run(folder, *AT_THE_END)
    assert_equal(weights(folder), weights(whole))
    units = [json.loads((each / "history.jsonl").read_text().splitlines()[-2])["tokens"] for each in (folder, whole)]
    assert units[0] == units[1]


def test_a_broken_first_step_of_an_epoch_leaves_the_generators_of_its_beginning(whole, changing, tmp_path):
    short = [*AT_THE_END, "--batch_size", "80"]  # four steps an epoch
    expected = weights(run(tmp_path / "expected", *short))
    changing(lambda loss: loss + math.nan, at=5)
    with pytest.raises(UserError, match="step 5: the loss is not finite"):
        run(tmp_path / "run", *short)
    changing()
    assert_equal(weights(run(tmp_path / "run", *short)), expected)


def test_a_broken_first_step_saves_nothing_and_a_saved_step_is_not_saved_again(changing, tmp_path):
    changing(lambda loss: loss + math.nan, at=1)
    with pytest.raises(UserError, match=r"step 1: .*; nothing was saved, as no step was applied before; lower"):
        run(tmp_path / "first", *AT_THE_END)
    assert not list((tmp_path / "first" / "checkpoints").glob("*"))
    changing(lambda loss: loss + math.nan, at=3)
    with pytest.raises(UserError, match=r"step 3: .* are saved whole in .*checkpoint-2"):
        run(tmp_path / "third", *SETTINGS, "--save_steps", "2")


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(model.parameters()).data[0] = math.nan

    monkeypatch.setattr(callbacks.RecordHistory, "on_step_end", spoil, raising=False)
    for name, saving in {"end": ["--max_steps", "2", "--save_steps", "0"], "steps": ["--save_steps", "2"]}.items():
        with pytest.raises(UserError, match=r"after step 2 the weights are not finite \(.*\), so they were not saved"):
            run(tmp_path / name, *SETTINGS, *saving)
        assert not (tmp_path / name / "config.json").exists()
        assert not list((tmp_path / name / "checkpoints").glob("*"))
    with pytest.raises(UserError, match=r"step 3: .*after step 2 the weights are not finite \(.*\), so they were not"):
        run(tmp_path / "later", *AT_THE_END)


def test_a_spike_is_warned_of_once(changing, caplog, tmp_path):
    changing(lambda loss: loss * 1e4, at=6)
    run(tmp_path / "run", *AT_THE_END)
    assert caplog.text.count("the step was applied: look at its rows") == 1
    assert "step 6: the loss is " in caplog.text
    assert "and the median of the last 5 was " in caplog.text


def test_overflows_under_a_gradient_scaler_are_counted_and_a_loss_is_looked_at_all_the_same(
    changing, caplog, tmp_path
):
    changing(with_gradient(1e35), at=3, scaler=torch.amp.GradScaler("cpu", init_scale=1e6))
    folder = run(tmp_path / "run", *SETTINGS, "--save_steps", "8", "--ema_decay", "0.5")
    averages = load_file(folder / "checkpoints" / "checkpoint-8" / "averages.safetensors")
    assert averages["num_updates"] == 7
    assert "1 of 8 steps were skipped, because their gradients were beyond float16" in caplog.text
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row.get("num_overflows") for row in rows if "loss" in row] == [None, None, *[1] * 6]
    changing(lambda loss: loss + math.nan, scaler=torch.amp.GradScaler("cpu", init_scale=1.0))
    with pytest.raises(UserError, match="step 8: the loss is not finite, so it was not applied"):
        run(tmp_path / "stopped", *AT_THE_END)
    assert damages(tmp_path / "stopped" / "checkpoints" / "checkpoint-7") == []
    changing(with_gradient(math.nan), at=4, scaler=torch.amp.GradScaler("cpu", init_scale=1.0))
    with pytest.raises(UserError, match="step 4: the gradient is not finite, whatever it is scaled by"):
        run(tmp_path / "scaled", *AT_THE_END)
