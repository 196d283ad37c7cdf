"""How the process of a command was started, and how it ends: its launcher, its errors in words, its process group."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bmtk.errors import exit_code_of, fault_report, user_message
from bmtk.settings import origin_of_value

LAUNCHERS = ("accelerate", "torchrun")
PROC = Path("/proc")


def launcher_options(parent: Sequence[str], argv: Sequence[str]) -> list[str]:
    """`accelerate launch` or `torchrun` and its options, if `parent` is the command line that has started `argv`."""
    if not argv or list(parent[len(parent) - len(argv) :]) != list(argv):
        return []
    before = list(parent[: len(parent) - len(argv)])
    for index, word in enumerate(before):
        if Path(word).name in LAUNCHERS:
            return [Path(word).name, *before[index + 1 :]]
        if before[index : index + 2] == ["-m", "accelerate.commands.launch"]:
            return ["accelerate", "launch", *before[index + 2 :]]
        if before[index : index + 2] == ["-m", "torch.distributed.run"]:
            return ["torchrun", *before[index + 2 :]]
    return []


def words_of(process: int | str, what: str) -> list[str]:
    """The words of /proc/PROCESS/cmdline or environ; [] where the system does not show them."""
    try:
        return (PROC / str(process) / what).read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn an exception into exit status 1, or 65 for `Diverged`.

    What the user can mend is shown as one message, else there is a report with its traceback.  BMTK_DEBUG=1 lets
    every exception through.  A process that ends in order leaves its process group first.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a letter is no reason to end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        leave_process_group()
    except SystemExit:  # a run that was asked to stop
        leave_process_group()
        raise
    except Exception as error:
        if os.environ.get("BMTK_DEBUG"):
            raise
        message = user_message(error)
        if message is None:
            sys.stderr.write(fault_report(error))
        else:
            rank = os.environ.get("RANK", "0")
            message += origin_of_value(message)
            prefix = "error" if rank == "0" else f"error (process {rank})"
            sys.stderr.write(f"\n{prefix}: {message}\n  (BMTK_DEBUG=1 shows where this was raised)\n")
        sys.exit(exit_code_of(error))


def leave_process_group() -> None:
    """Close the connections to the other processes of the run, if there are any.

    Without it the threads of gloo are alive when the interpreter ends, and some processes end with SIGABRT ("terminate
    called without an active exception") after their work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
