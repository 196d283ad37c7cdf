"""What a process waited for, when it has waited for the others too long."""

import json
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator

from bmtk.errors import LOST_PROCESS, UserError

# NCCL's ten minutes would end a run whose main process draws many samples.
TIMEOUT = timedelta(minutes=30)
LONGEST_INQUIRY = timedelta(seconds=5)  # in which the other processes that wait, too, can say so
WRAPPERS = "wrapper", "inner", "decorate_context"
TIMED_OUT = "imed out waiting", "Application timeout", "timed out after", "Wait timeout"  # of gloo, and of stores


def timeout_of(accelerator: Accelerator) -> timedelta:
    """How long its processes wait for each other."""
    handler = accelerator.init_handler
    return handler.timeout if handler and handler.timeout else TIMEOUT


def set_timeouts(accelerator: Accelerator) -> None:
    """Give all groups of processes the time-out that the first one was made with: a mesh makes its own without it."""
    if accelerator.num_processes > 1:
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            torch.distributed.distributed_c10d._set_pg_timeout(timeout_of(accelerator), group)


@contextmanager
def named_waits(accelerator: Accelerator, what: str | Callable[[], str]) -> Iterator[None]:
    """Turn the error of a wait for other processes that took too long into one that says what was waited for.

    what: that which all processes do in the body.  Waits in a context inside of this one are named by that.  (Over
    NCCL, torch ends the process itself, and names the operation.)

    Raises: UserError that names the processes which have not come, as far as the others can say it.
    """
    try:
        yield
    except RuntimeError as error:
        is_late = any(words in str(error) for words in TIMED_OUT)
        if accelerator.num_processes == 1 or not (is_late or any(words in str(error) for words in LOST_PROCESS)):
            raise
        phase = what if isinstance(what, str) else what()
        found = _inquire(accelerator, phase, waits=is_late)
        if not is_late:
            raise
        seconds = timeout_of(accelerator).total_seconds()
        raise UserError(
            f"waited {seconds:g} seconds (timeout_minutes={seconds / 60:g}) for other processes, in {phase} "
            f"({_operation(error)}): {found}; look at what they print and at their machines, then run the same "
            "command again: it goes on from the newest checkpoint. If they are only slow, raise timeout_minutes"
        ) from error


def _inquire(accelerator: Accelerator, phase: str, *, waits: bool) -> str:
    """Say in the store of the run that this process waits; then which others do not, and where those wait that do."""
    rank, count = accelerator.process_index, accelerator.num_processes
    keys = [f"bmtk-waits/{number}" for number in range(count)]
    answers: dict[int, str] = {}
    with suppress(Exception):  # the store may be gone with the process that held it
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        store.set(keys[rank], json.dumps(f"{phase}, on {socket.gethostname()}"))
        until = time.monotonic() + waits * min(LONGEST_INQUIRY, timeout_of(accelerator)).total_seconds()
        while len(answers) < count and time.monotonic() < until:
            time.sleep(0.05)
            new = [number for number in range(count) if number not in answers and store.check([keys[number]])]
            answers |= {number: json.loads(store.get(keys[number])) for number in new}
    if not answers:
        return "which ones is not known"
    if missing := [str(number) for number in range(count) if number not in answers]:
        return f"process {', '.join(missing)} of {count} has not come"
    return "; ".join(f"process {number} waits in {where}" for number, where in answers.items())


def _operation(error: BaseException) -> str:
    """The function of torch that waited."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__", "").startswith("torch.")]
    public = [name for name in names if not name.startswith("_") and name not in WRAPPERS]
    return public[-1] if public else "an operation of several processes"
