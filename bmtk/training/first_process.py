"""The main process does first what the others then find, however long it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock

LOCK = ".reading.lock"


@contextmanager
def main_process_first(accelerator: Accelerator, folder: Path | None) -> Iterator[None]:
    """Run the body in the main process, then in one of the others after another.

    They wait for a lock in `folder`: a barrier would end the run when the main process takes longer than the process
    group's time-out.  The system takes a lock from a process that dies.  Without a folder, for work that is short, it
    is a barrier.
    """
    if accelerator.num_processes == 1:
        yield
        return
    if folder is None:
        with accelerator.main_process_first():
            yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    if accelerator.is_main_process:
        with lock:
            accelerator.wait_for_everyone()  # not before the lock is held may others ask for it
            yield
    else:
        accelerator.wait_for_everyone()
        with lock:
            yield
