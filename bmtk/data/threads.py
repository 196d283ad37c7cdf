"""Rows that are made side by side, by the threads that would otherwise wait for the model's next step."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def side_by_side(make: Callable[..., Made], *columns: Iterable[Any]) -> list[Made]:
    """`make` of each row of the `columns`, in order, by as many threads as torch has.

    Of use where `make` is mostly work outside of Python, such as Pillow's and numpy's on whole images; torch's own
    operations start threads of their own for each of these, which then wait for one another.  A worker of a DataLoader
    has one thread, and so makes one row after the other.  Raises: what `make` raises for the first row.
    """
    threads = torch.get_num_threads()
    return list(map(make, *columns) if threads == 1 else _pool(os.getpid(), threads).map(make, *columns))


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of a process: a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"rows of {process}")
