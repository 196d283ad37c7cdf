"""recipes/finetune.py on two processes trains, and measures over all rows, as on one."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from forked import forked
from safetensors.torch import load_file

from bmtk.training import trainer
from recipes import finetune

ROOT = Path(__file__).parent.parent
THINGS = ("bread", "ferry", "song")
BROKEN = 13  # a training row
WORDS = (*THINGS, "soup", "train", "drum")
# Three steps an epoch: the last one has 3 rows on one process, and on two 1 and 2.
SHORT = "--num_train_epochs 2 --warmup_steps 0 --save_strategy no --eval_strategy epoch --logging_steps 1"
TEXT = "--tokenizer word --dataset {data}"
CASES = {
    "several labels": f"--task sequence_classification {TEXT} --label_column about",
    "grouped by length": f"--task sequence_classification {TEXT} --train_sampling_strategy group_by_length",
    "numbers": f"--task sequence_classification {TEXT} --label_column stars",
    "row by row": f"--task sequence_classification {TEXT} --label_column stars --micro_batch_size 1",
    "tags in windows": f"--task token_classification {TEXT} --max_length 4",
    "speech": "--task speech_recognition --max_steps 3 --eval_strategy no",
    "little memory": f"--task sequence_classification {TEXT} --label_column stars --hidden_dropout 0",
    "skipped": f"--task sequence_classification {TEXT} --label_column stars --hidden_dropout 0 --nonfinite skip",
    "boxes": "--task object_detection --norm_type layer_norm --max_steps 2 --eval_strategy no",
}


def write_rows(folder: Path) -> None:
    for first, (name, count) in enumerate({"train": 19, "validation": 5, "test": 7}.items(), 1):
        rows = []
        for row in range(100 * first, 100 * first + count):
            words = [WORDS[row * step % 6] for step in range(1, 5 + row % 5)] + [f"n{row}"]
            tags = ["B-thing" if word in THINGS else "O" for word in words]
            said = {
                "label": words[0],
                "about": [word for word in THINGS if word in words],
                "stars": words.count("soup") / 2,
            }
            rows.append({"text": " ".join(words), "tokens": words, "tags": tags, **said})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def runs(folder: Path, *, data: Path) -> list[list[str]]:
    common = f"--preset smoke --disable_tqdm true --batch_size 8 {SHORT}"
    return [
        [*f"{common} {case.format(data=data)}".split(), "--output_dir", f"{folder / name}"]
        for name, case in CASES.items()
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Of all runs on one process, and on two that share the same batches, forked once."""
    folder = tmp_path_factory.mktemp("processes")
    one, two = folder / "one", folder / "two"
    write_rows(folder)
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_trainer", broken_by_a_row(trainer.build_trainer))
        for argv in runs(one, data=folder):
            finetune.main(argv)
    assert forked(lambda rank: run_on_two(runs(two, data=folder)), seconds=300) == [0, 0]
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_measure_as_one(folders, name):
    one, two = (json.loads((folder / name / "run.json").read_text(encoding="utf-8")) for folder in folders)
    assert two["environment"]["num_processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4, nan_ok=True)
    assert losses(folders[1] / name) == pytest.approx(losses(folders[0] / name), rel=1e-4)


def losses(folder: Path) -> list[float]:
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.slow
def test_two_processes_halve_their_micro_batches_where_one_has_too_little_memory(folders):
    one, two = (folder / "little memory" / "micro_batches.json" for folder in folders)
    assert json.loads(two.read_text()) == {"limits": [[0, 2]]}
    assert not one.exists()


@pytest.mark.slow
def test_two_processes_skip_a_step_together_that_one_of_them_cannot_apply(folders):
    """The step has a broken row, once an epoch, on one of the processes; the others' losses are compared above."""
    names = [sorted(path.name for path in (folder / "skipped" / "bad_steps").iterdir()) for folder in folders]
    assert len(names[0]) == 2
    assert names[0] == names[1]
    for name in names[0]:
        one, *two = (
            load_file(folder / "skipped" / "bad_steps" / name / f"process-{number}.safetensors")["rows"].tolist()
            for folder, number in ((folders[0], 0), (folders[1], 0), (folders[1], 1))
        )
        assert sorted(one) == sorted(two[0] + two[1])
        assert BROKEN in one


@pytest.mark.slow
def test_two_processes_end_where_one_has_too_little_memory_in_a_step_and_go_on_with_half_the_rows(folders, tmp_path):
    """Although a pass that the other one does not wait for could be repeated alone."""
    (argv,) = (argv for argv in runs(tmp_path, data=folders[0].parent) if argv[-1].endswith("little memory"))
    argv += ["--save_strategy", "steps", "--save_steps", "1"]
    assert forked(lambda rank: run_on_two([argv], first=4), seconds=60)[1] == 99
    folder = tmp_path / "little memory"
    assert json.loads((folder / "micro_batches.json").read_text()) == {"limits": [[4, 2]]}
    assert max(path.name for path in (folder / "checkpoints").iterdir()) == "checkpoint-4"
    assert forked(lambda rank: run_on_two([argv], first=4), seconds=60) == [0, 0]
    ours, one = (losses(each) for each in (folder, folders[0] / "little memory"))
    assert ours == pytest.approx(one, rel=1e-4)


def broken_by_a_row(build):
    """A `build_trainer` whose runs called skipped have no finite gradient where a batch has the row `BROKEN`."""

    def built(model, *args, folder, **kwargs):
        trainer = build(model, *args, folder=folder, **kwargs)
        if folder.parent.name == "skipped":
            word = trainer.processing_class.convert_tokens_to_ids(f"n{100 + BROKEN}")

            def spoil(module, inputs, given, outputs):
                if module.training and (given["input_ids"] == word).any():
                    scored = outputs.reader_logits[0]
                    scored.register_hook(lambda gradient: gradient * float("nan"))

            model.register_forward_hook(spoil, with_kwargs=True)
        return trainer

    return built


def limit_memory(first: int) -> None:
    """Let the second process have memory for two rows from step `first` on, in the runs that are about that."""
    build = trainer.build_trainer

    def limited(model, *args, folder, **kwargs):
        built = build(model, *args, folder=folder, **kwargs)

        def refuse(module, inputs, given, outputs):
            if module.training and len(given["input_ids"]) > 2 and built.state.global_step >= first:
                raise MemoryError

        if folder.parent.name == "little memory" and os.environ["RANK"] == "1":
            model.register_forward_hook(refuse, with_kwargs=True)
        return built

    trainer.build_trainer = limited


def run_on_two(runs: list[list[str]], *, first: int = 0) -> None:
    limit_memory(first)
    trainer.build_trainer = broken_by_a_row(trainer.build_trainer)
    os.chdir(ROOT)
    for argv in runs:
        finetune.main(argv)
    torch.distributed.destroy_process_group()
