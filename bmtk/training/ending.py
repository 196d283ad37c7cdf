"""A process that ends with an error ends the others of its run, whatever they wait for.

A process that has run out of memory in the middle of a step cannot take part in what the others wait for.  Over NCCL,
and on other machines than its own, they would wait until a time-out.  So it leaves a note in the store by which the
processes have found each other, and a thread in each of them looks there.
"""

import itertools
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import Accelerator

logger = logging.getLogger(__name__)

NUMBERS = itertools.count()  # of the bodies that this process has begun; a note is for those of one number
EVERY = 2.0  # seconds between two looks
GRACE = 10.0  # seconds that a process has to end by itself, with its own message, when another one has ended


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Run the body; after an error in it, all processes end within `EVERY` + `GRACE` seconds, with status 1."""
    if accelerator.num_processes == 1:
        yield
        return
    # A client of its own: the thread must not wait for an answer that another thread waits for.
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    note, is_over = f"bmtk-ended-by-{next(NUMBERS)}", threading.Event()
    threading.Thread(target=_watch, args=(store.clone(), note, is_over), daemon=True).start()
    try:
        yield
    except Exception as error:
        with suppress(RuntimeError):  # of a store whose process has ended
            store.set(note, f"process {accelerator.process_index} ({type(error).__name__})")
        raise
    finally:
        is_over.set()


def _watch(store: Any, note: str, is_over: threading.Event) -> None:
    while not is_over.wait(EVERY):
        if not (ended := _who_ended(store, note)) or is_over.wait(GRACE):
            continue
        logger.error("%s has ended, and has shown why: this process, which would wait for it, ends, too", ended)
        logging.shutdown()
        os._exit(1)


def _who_ended(store: Any, note: str) -> str:
    """What another process has noted, "" if none has; the process that keeps the notes, if it cannot be asked."""
    try:
        return store.get(note).decode() if store.check([note]) else ""
    except RuntimeError:
        return "the process that the others have found each other by"
