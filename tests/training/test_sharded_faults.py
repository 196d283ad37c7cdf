"""A sharded run of two processes, one of which is killed anywhere: the same command ends in the same weights.

Each case forks the two processes, which is quicker than to start them, and ends the other one when one has died, as a
launcher does.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_run
from forked import forked
from tiny_run import arguments, digest, tiny_model
from transformers import AutoModelForCausalLM

from bmtk.training import checkpoint
from bmtk.training.manifest import damages

pytestmark = pytest.mark.slow
SETTINGS = {"fsdp_size": 2, "num_train_steps": 4, "save_steps": 2, "eval_steps": 3, "micro_batch_size": 2}
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def killed_at(event: str, number: int):
    """A function that ends this process when it is called with `event` for the `number`-th time, counted from 1."""
    left = [number]

    def count(what: str) -> None:
        left[0] -= what == event
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def train(folder: Path, happens: Callable[[str], None] = lambda what: None) -> None:
    """The run, which calls `happens` with "write", "flush", "forward" and "evaluation" before each of them."""

    def watch(event: str, details: tuple) -> None:
        flags = details[2] if event == "open" else 0
        is_write = event in CHANGES or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))
        if is_write and (str(folder) in str(details[0]) or not os.path.isabs(str(details[0]))):
            happens("write")

    def predict(model, batch):
        happens("evaluation")
        return original(model, batch)

    def flush(path):
        happens("flush")
        original_flush(path)

    original, tiny_run.predict = tiny_run.predict, predict
    original_flush, checkpoint.flush = checkpoint.flush, flush
    sys.addaudithook(watch)
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, inputs: happens("forward") if module.training else None)
    tiny_run.run(arguments(folder, **SETTINGS), model=model)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> str:
    """The weights of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight")
    assert forked(lambda rank: train(folder)) == [0, 0]
    return digest(AutoModelForCausalLM.from_pretrained(folder))


# The second process writes its tensors outside of Python, and flushes two files of each checkpoint.
WRITES = [(0, "write", number) for number in range(3, 52, 6)] + [(1, "flush", number) for number in (1, 2, 3)]
ELSEWHERE = [(0, "forward", 6), (1, "forward", 5), (1, "forward", 7), (0, "evaluation", 1), (1, "evaluation", 1)]


@pytest.mark.parametrize(("rank", "event", "number"), WRITES + ELSEWHERE)
def test_the_same_command_ends_in_the_same_weights_wherever_a_process_is_killed(
    straight, tmp_path, rank, event, number
):
    happens = killed_at(event, number)
    statuses = forked(lambda own: train(tmp_path, happens if own == rank else lambda what: None))
    assert statuses[rank] == -signal.SIGKILL
    assert not any(damages(path) for path in tmp_path.glob("checkpoints/step-*"))
    assert forked(lambda own: train(tmp_path)) == [0, 0]
    assert digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == straight
    assert not list(tmp_path.rglob(".partial*"))
