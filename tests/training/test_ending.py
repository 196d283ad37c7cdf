"""A process that ends with an error ends the others, also where these would wait for it for a long time.

As a script it is one of two processes: test_ending.py FOLDER FSDP_SIZE RANK_WITHOUT_MEMORY.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from faults import SmallMemory
from tiny_run import TinyBatches, arguments, read_history, run, tiny_model

import bmtk
from bmtk.process import clean_errors
from bmtk.training import ending

FIRST = 3  # step whose memory is too little, counted from 0
SETTINGS = {"num_train_steps": 6, "save_steps": 2, "eval_steps": 0, "logging_steps": 1}


def launch(folder: Path, *options: int) -> list[tuple[int, str, float]]:
    """Exit codes, errors and seconds of two processes that no launcher ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    places |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(bmtk.__file__).parents[1])}
    command, pipe = [sys.executable, __file__, str(folder), *map(str, options)], subprocess.PIPE
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **places, "RANK": rank, "LOCAL_RANK": rank}, stderr=pipe, text=True
        )
        for rank in ("0", "1")
    ]
    started, results = time.monotonic(), []
    for process in processes:
        try:
            errors = process.communicate(timeout=100)[1]
        finally:
            process.kill()
        results.append((process.returncode, errors, time.monotonic() - started))
    return results


@pytest.mark.slow
def test_a_sharded_run_ends_where_one_process_has_too_little_memory_and_goes_on_with_half_the_rows(tmp_path):
    folder = tmp_path / "run"
    (first, waiting, _), (second, failed, _) = launch(folder, 2, 1)
    assert (first, second) == (1, 1)
    assert failed.count("process 1 is out of memory; run the same command again: it goes on from the last") == 1
    assert "has stopped; its own message says why" in waiting or "process 1 (UserError) has ended" in waiting
    assert json.loads((folder / "micro_batches.json").read_text()) == {"limits": [[FIRST, 2]]}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert [code for code, *_ in launch(folder, 2, 1)] == [0, 0]
    run(arguments(tmp_path / "whole", **SETTINGS), model=tiny_model())
    for ours, theirs in zip(read_history(folder), read_history(tmp_path / "whole"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "ended"),
    [(0, ""), (1, "process 1 (UserError) has ended, and has shown why: ")],  # the notes of the first end with it
)
def test_a_process_that_would_wait_for_ever_ends_when_another_one_has(tmp_path, rank, ended):
    results = launch(tmp_path / "run", 1, rank)
    (_, failed, _), (_, waiting, seconds) = results[rank], results[1 - rank]
    assert [code for code, *_ in results] == [1, 1]
    assert seconds < 60
    assert f"process {rank} is out of memory" in failed
    assert f"{ended}this process, which would wait for it, ends, too" in waiting


class Store:
    """Answers of a store, one after another; an exception is raised."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def check(self, keys):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def get(self, key):
        return b"process 3 (MemoryError)"


def test_a_note_or_a_lost_store_is_another_process_that_has_ended():
    answers = [ending._who_ended(Store(answer), "note") for answer in (False, True, RuntimeError("connection reset"))]
    assert answers[:2] == ["", "process 3 (MemoryError)"]
    assert answers[2].startswith("the process that the others have found")


def forever(model, inputs, outputs):
    """What a process does that waits in a collective which the other one never joins."""
    if model.training and model.batches.now >= FIRST:
        time.sleep(3600)


def main(folder: Path, fsdp_size: int, without_memory: int) -> None:
    torch.set_num_threads(1)
    ending.EVERY, ending.GRACE = 0.2, 0.5
    model, rank = tiny_model(), int(os.environ["RANK"])

    def batches(**share) -> TinyBatches:
        made = memory.of(TinyBatches(0, **share))
        model.batches = made
        return made

    memory = SmallMemory(model, 2 if rank == without_memory else 99, first=FIRST)
    if fsdp_size == 1 and rank != without_memory:
        model.register_forward_hook(forever)
    with clean_errors():
        run(arguments(folder, fsdp_size=fsdp_size, **SETTINGS), model=model, batches=batches)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
