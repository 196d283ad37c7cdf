"""A checkpoint that is written while training goes on is that of the step after which it was begun."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_run import Stopping, TinyBatches, arguments, run, tiny_model
from torch import nn

from bmtk.training import checkpoint, memory, snapshot
from bmtk.training.arguments import LoopArguments
from bmtk.training.checkpoint import Checkpoints, TrainState, newest_checkpoint
from bmtk.training.guards import is_broken
from bmtk.training.manifest import damages
from bmtk.training.prepared import prepare
from bmtk.training.snapshot import Snapshot, has_memory

KEPT = {"ema_decay": 0.9, "optimizer": "muon"}


def contents(folder: Path) -> dict[str, object]:
    """The files of all checkpoints of a run: tensors byte by byte, and the state without what a clock has measured."""
    found: dict[str, object] = {}
    for path in sorted(folder.glob("checkpoints/**/*")):
        name = str(path.relative_to(folder))
        if path.name == "state.json":
            progress = json.loads(path.read_text())["progress"]
            found[name] = {key: value for key, value in progress.items() if key != "seconds"}
        elif path.is_file() and path.name != "manifest.json":
            found[name] = path.read_bytes()
    return found


class Ahead(TinyBatches):
    """Batches that note when the second step after a checkpoint is about to be trained."""

    def __init__(self):
        super().__init__(0)
        self.is_ahead = threading.Event()

    def __getitem__(self, step: int):
        if step in (3, 5):  # counted from 0; the checkpoints follow steps 2, 4 and 6, counted from 1
            self.is_ahead.set()
        return super().__getitem__(step)


def test_steps_that_are_trained_meanwhile_do_not_reach_the_checkpoint(tmp_path, monkeypatch):
    straight = run(arguments(tmp_path / "waits", save_in_background=False, **KEPT))
    batches, were_ahead, written = Ahead(), [], checkpoint.written_whole

    def later(*args, **options):
        were_ahead.append(batches.is_ahead.wait(1))
        batches.is_ahead.clear()
        return written(*args, **options)

    monkeypatch.setattr(checkpoint, "written_whole", later)
    assert run(arguments(tmp_path / "goes on", **KEPT), batches=batches) == straight
    assert were_ahead == [True, True, False]
    assert contents(tmp_path / "goes on") == contents(tmp_path / "waits")
    assert len(list((tmp_path / "waits").glob("checkpoints/*"))) == 3


def test_weights_are_not_updated_before_they_are_copied(tmp_path, monkeypatch):
    straight = run(arguments(tmp_path / "waits", save_in_background=False, **KEPT))
    move = Snapshot.move_to_host

    def slowly(self, *args, **options):
        time.sleep(0.2)  # several steps
        move(self, *args, **options)

    monkeypatch.setattr(Snapshot, "move_to_host", slowly)
    assert run(arguments(tmp_path / "goes on", **KEPT)) == straight
    assert contents(tmp_path / "goes on") == contents(tmp_path / "waits")


def test_buffers_are_those_of_the_moment_when_the_save_begins():
    model = tiny_model()
    model.register_module("norm", nn.BatchNorm1d(3))
    prepared = prepare(model, LoopArguments(), Accelerator(cpu=True))
    taken = Snapshot.of(prepared)
    model.norm(torch.randn(4, 3))
    assert torch.equal(taken.weights["norm.running_mean"], torch.zeros(3))
    assert not torch.equal(model.norm.running_mean, torch.zeros(3))


def test_a_write_that_fails_ends_the_run_soon_and_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    made, asked = [], []
    written = checkpoint.written_whole

    def failing(final, **options):
        made.append(final.name)
        if len(made) == 2:
            raise OSError("No space left on device")
        return written(final, **options)

    monkeypatch.setattr(checkpoint, "written_whole", failing)

    class Slow(TinyBatches):
        def __getitem__(self, step: int):
            asked.append(step)
            time.sleep(0.01)
            return super().__getitem__(step)

    with pytest.raises(OSError, match="No space left on device"):
        run(arguments(tmp_path, num_train_steps=200, eval_steps=0, save_steps=40), batches=Slow(0))
    assert made == ["step-00000040", "step-00000080"]
    assert max(asked) < 105  # long before the next save
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000040"]
    assert damages(tmp_path / "checkpoints" / "step-00000040") == []


@pytest.mark.parametrize("how", ["error", "signal"])
def test_whatever_ends_a_run_waits_for_the_checkpoint_that_is_being_written(tmp_path, monkeypatch, how):
    written = checkpoint.written_whole

    def later(*args, **options):
        time.sleep(0.3)
        return written(*args, **options)

    class Failing(TinyBatches):
        def __getitem__(self, step: int):
            if step == 2:
                raise ZeroDivisionError
            return super().__getitem__(step)

    monkeypatch.setattr(checkpoint, "written_whole", later)
    batches, last = {"error": (Failing(0), 2), "signal": (Stopping(2), 3)}[how]
    with pytest.raises((ZeroDivisionError, SystemExit)):
        run(arguments(tmp_path), batches=batches)
    newest = newest_checkpoint(tmp_path)
    assert newest.name == f"step-{last:08d}"
    assert damages(newest) == []
    assert not list(tmp_path.glob("checkpoints/.partial*"))


def test_where_memory_is_too_little_training_waits_and_a_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "has_memory", lambda num_bytes: False)
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    checkpoints = Checkpoints(tmp_path, prepared, in_background=True)
    for step in (1, 2):
        assert damages(checkpoints.save(TrainState(step=step))) == []
    assert caplog.text.count("no memory for a copy of what process 0 saves (0.0 GB): training waits") == 1


def test_the_memory_for_a_copy_is_that_of_all_processes_here_beside_what_their_steps_take(monkeypatch):
    monkeypatch.setattr(snapshot, "available_memory", lambda: 10**12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert has_memory(2 * 10**11)
    assert not has_memory(25 * 10**10 + 1)
    prepared = prepare(tiny_model(), LoopArguments(), Accelerator(cpu=True))
    weights = sum(parameter.numel() * 4 for parameter in prepared.unwrapped.parameters())
    assert Snapshot.of(prepared).memory_for_copies() == weights


def test_a_container_has_the_memory_below_its_limit_and_what_is_cached_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    of_machine = memory.available_memory()  # without such a limit
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 2500000\ninactive_file 400000\n")
    (tmp_path / "memory.max").write_text("5000000\n")
    assert memory.available_memory() == 2_400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == pytest.approx(of_machine, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_found_and_large_ones_are_none_of_them(dtype):
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert not is_broken(largest)  # although their sum is infinite
    for bad in (torch.inf, -torch.inf, torch.nan):
        for others in (largest, torch.zeros(9, dtype=dtype), -largest):
            value = others.clone()
            value[4] = bad
            assert is_broken(value)
    assert is_broken(torch.tensor([torch.inf, -torch.inf]))
    assert not is_broken(torch.tensor([2**62, 3]))
