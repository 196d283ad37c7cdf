"""recipes/finetune.py resumes exactly at any step, with every kind of sampling that a shipped config uses.

As a script it is one of two processes: test_finetune_resume.py DATA FOLDER KINDS.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from smoke_runs import RECIPE_CONFIGS
from test_finetune_guards import Changed

from bmtk.errors import UserError
from bmtk.training import trainer as trainer_module
from bmtk.training.manifest import damages
from recipes import finetune

ROOT = Path(__file__).parent.parent
STEPS = 8  # three an epoch, so a run ends within its third
# Kinds that no config has today are tried all the same.
ADAPTER, WORKERS = ("random", True, False, "lora", False), ("group_by_length", True, True, None, True)
MORE = [ADAPTER, WORKERS, *((name, False, False, None, False) for name in ("sequential", "batch_rebalance"))]
EXACT = ("group_by_length", True, False, None, False)  # without dropout
PLAIN = ("random", False, False, None, False)


def kind_of(config: Path) -> tuple:
    """Sampling, whether steps are accumulated, whether weights are averaged, adapter, whether there are workers."""
    _, _, args, adapter, *_ = finetune.read_arguments(["--config", str(config)])
    accumulates, averages = args.gradient_accumulation_steps > 1, args.ema_decay > 0
    return args.train_sampling_strategy, accumulates, averages, adapter.adapter, args.dataloader_num_workers > 0


def kinds() -> list[tuple]:
    """The distinct kinds of all shipped configs."""
    with contextlib.chdir(ROOT):
        return sorted({*map(kind_of, RECIPE_CONFIGS), *MORE}, key=str)


def name_of(kind: tuple) -> str:
    sampling, accumulates, averages, adapter, workers = kind
    facts = {"accumulated": accumulates, "averaged": averages, "workers": workers, adapter: adapter}
    return ", ".join([sampling, *(name for name, is_so in facts.items() if is_so)])


def write_rows(folder: Path) -> None:
    """23 rows to train on, of 1 to 12 words: the last of an epoch's three steps has seven."""
    draw = torch.Generator().manual_seed(1)
    for first, (name, count) in enumerate({"train": 23, "validation": 3, "test": 3}.items(), 1):
        lines = []
        for row in range(100 * first, 100 * first + count):
            words = torch.randint(0, 9, (1 + row * 7 % 12,), generator=draw).tolist()
            text = " ".join(f"w{word}" for word in words) + f" n{row}"
            lines.append(json.dumps({"text": text, "label": "ab"[sum(words) % 2]}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def settings_of(kind: tuple, data: Path) -> list[str]:
    """The command line of a run of the kind, whose every step is saved; with dropout, and hidden tokens."""
    sampling, accumulates, averages, adapter, workers = kind
    argv = ["--preset", "smoke", "--disable_tqdm", "true", "--dataset", str(data), "--tokenizer", "word"]
    argv += ["--hidden_size", "16", "--num_hidden_layers", "1", "--hidden_dropout", "0.1", "--token_dropout", "0.2"]
    argv += ["--max_steps", str(STEPS), "--batch_size", "8", "--logging_steps", "1", "--save_steps", "1"]
    argv += ["--save_total_limit", "99", "--eval_strategy", "no", "--train_sampling_strategy", sampling]
    argv += ["--micro_batch_size", "2"] if accumulates else []
    argv += ["--ema_decay", "0.9"] if averages else []
    argv += ["--dataloader_num_workers", "1"] if workers else []
    argv += ["--hidden_dropout", "0", "--token_dropout", "0"] if kind == EXACT else []
    return argv + (["--adapter", adapter, "--model", str(data / "base")] if adapter else [])


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def cut(whole: Path, other: Path, *, step: int) -> Path:
    """A copy of the folder of a run, as it was after `step`."""
    names = [f"checkpoint-{later}" for later in range(step + 1, STEPS + 1)]
    finished = ["config.json", "*model.safetensors", "run.json"]
    shutil.copytree(whole, other, ignore=lambda at, _: [*names, *(finished if at == str(whole) else [])])
    for path in [path for pattern in finished for path in other.glob(pattern)]:
        path.unlink()
    return other


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of the rows, and of a model to adapt."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder)
    run(PLAIN, folder, folder / "base")
    return folder


def run(kind: tuple, data: Path, output: Path) -> Path:
    with contextlib.chdir(ROOT):
        finetune.main([*settings_of(kind, data), "--output_dir", str(output)])
    return output


def assert_same_end(resumed: Path, whole: Path) -> None:
    assert losses(resumed) == losses(whole), resumed
    expected = weights(whole)
    different = [name for name, value in weights(resumed).items() if not torch.equal(value, expected[name])]
    assert not different, resumed


def test_all_configs_are_looked_at():
    assert {"random", "group_by_length"} <= {kind[0] for kind in kinds()}
    assert len(RECIPE_CONFIGS) >= 59


@pytest.mark.parametrize("kind", kinds(), ids=name_of)
def test_a_run_that_is_resumed_at_any_step_is_the_whole_one(kind, data, tmp_path):
    whole = run(kind, data, tmp_path / "whole")
    assert [step for step, _ in losses(whole)] == list(range(1, STEPS + 1))
    for step in (3, 7):  # at the end of an epoch, and in the middle of one that is not the first
        assert_same_end(run(kind, data, cut(whole, tmp_path / str(step), step=step)), whole)


@pytest.fixture(scope="module")
def of_two_processes(data, tmp_path_factory) -> Path:
    """A folder with a whole run of each kind and one that was resumed, on two processes that are started once."""
    folder = tmp_path_factory.mktemp("two")
    cut(run(EXACT, data, folder / "one"), folder / "one on two", step=4)
    cut(folder / "one", folder / "one on two with other batches", step=4)
    launch([str(data), str(folder), json.dumps(kinds())])  # with two, batches are accumulated elsewhere
    return folder


def launch(argv: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", str(port), __file__, *argv]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds(), ids=name_of)
def test_two_processes_resume_as_exactly_as_one(kind, of_two_processes):
    assert_same_end(of_two_processes / f"{name_of(kind)} resumed", of_two_processes / name_of(kind))


def with_other_batches(data: Path, folder: Path) -> None:
    """Resume a run on two processes as one whose batch size is that of a device."""
    if torch.distributed.get_rank() == 0:
        settings = json.loads((folder / "run_config.json").read_text(encoding="utf-8"))
        settings = {name: value for name, value in settings.items() if name != "batch_size"}
        settings["per_device_train_batch_size"] = 8
        (folder / "run_config.json").write_text(json.dumps(settings), encoding="utf-8")
    argv = settings_of(EXACT, data)
    for name in ("--batch_size", "--micro_batch_size"):
        del argv[argv.index(name) : argv.index(name) + 2]
    with contextlib.chdir(ROOT):
        finetune.main([*argv, "--per_device_train_batch_size", "8", "--output_dir", str(folder)])


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batches(of_two_processes, data, caplog):
    folder = of_two_processes
    on_one = run(EXACT, data, cut(folder / "two", folder / "two on one", step=4))
    assert "was saved by 2 processes, and 1 resume it: the data stay the same" in caplog.text
    for resumed in (folder / "one on two", on_one, folder / "two"):
        for (step, loss), (_, expected) in zip(losses(resumed), losses(folder / "one"), strict=True):
            assert loss == pytest.approx(expected, rel=1e-4), (resumed, step)
    told = (folder / "told.txt").read_text(encoding="utf-8")
    assert "saved with 8 rows per optimizer step (num_processes=1), and this run has 16 (num_processes=2)" in told


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_stops_all_after_the_weights_before_it(of_two_processes):
    saved = [of_two_processes / name / "checkpoints" / f"checkpoint-{STEPS - 1}" for name in ("broken", "two")]
    assert damages(saved[0]) == []
    assert not (of_two_processes / "broken" / "config.json").exists()
    assert all(torch.equal(value, weights(saved[0])[name]) for name, value in weights(saved[1]).items())


def main(data: Path, folder: Path, kinds: list[tuple]) -> None:
    torch.set_num_threads(1)
    for kind in kinds:
        whole, resumed = folder / name_of(kind), folder / f"{name_of(kind)} resumed"
        run(kind, data, whole)
        if torch.distributed.get_rank() == 0:
            cut(whole, resumed, step=7)
        torch.distributed.barrier()
        run(kind, data, resumed)
    run(EXACT, data, folder / "two")
    run(EXACT, data, folder / "one on two")
    try:
        with_other_batches(data, folder / "one on two with other batches")
    except UserError as error:
        if torch.distributed.get_rank() == 0:
            (folder / "told.txt").write_text(str(error), encoding="utf-8")
    stop_at_a_loss_of_one_process(data, folder / "broken")
    torch.distributed.destroy_process_group()


def stop_at_a_loss_of_one_process(data: Path, folder: Path) -> None:
    build = trainer_module.build_trainer

    def changed(*args, **kwargs):
        trainer = build(*args, **kwargs)
        change = torch.distributed.get_rank() * math.nan
        trainer.loss = Changed(trainer, lambda loss: loss + change, at=STEPS)
        return trainer

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(UserError):
        patch.setattr(trainer_module, "build_trainer", changed)
        run(EXACT, data, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
