"""Memory for the steps of a training on a CPU: kept from one step to the next, and in huge pages."""

import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
LARGEST = 2**31 - 1  # what an int holds
LARGEST_BEFORE = 2**25  # what older versions take
NEVER = -1  # as a TRIM_THRESHOLD
PART = 2**30  # bytes
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: memory that is asked for counts as used


def keep_freed_memory(device: torch.device) -> None:
    """Where a CPU trains, let this process reuse large blocks that it freed, instead of giving them back to Linux.

    A training step allocates the same tensors each time.  By default glibc returns each block of more than 32 MB, and
    the end of its heap, and the kernel clears every page anew when it is written: about a tenth of a step.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    libc = glibc()
    if libc is None:
        return
    accepts_large = libc.mallopt(MMAP_THRESHOLD, LARGEST)
    if not accepts_large:  # glibc before 2.35
        libc.mallopt(MMAP_THRESHOLD, LARGEST_BEFORE)
    libc.mallopt(TRIM_THRESHOLD, NEVER)
    if accepts_large and addresses_are_free():
        ask_for_huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and its malloc is the one of this process (no other was preloaded)."""
    process = ctypes.CDLL(None)
    if getattr(process, "mallopt", None) is None:
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    ours, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (process, libc))
    return libc if ours == own else None


def addresses_are_free() -> bool:
    """Whether memory that is asked for and never touched costs nothing."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    counts = OVERCOMMIT.exists() and OVERCOMMIT.read_text().strip() == "2"
    return not counts and all(limit == resource.RLIM_INFINITY for limit in limits)


def ask_for_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Let the next `size` bytes of the heap be pages of 2 MB where they are touched; none is touched here.

    With pages of 4 kB a processor looks up addresses for a quarter of a step, and more in a virtual machine.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    parts: list[int] = []
    while len(parts) < size // PART and (part := libc.malloc(PART)) is not None:
        start = -(-part // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, part + PART - start, mmap.MADV_HUGEPAGE)  # a refusal leaves pages as they are
        parts.append(part)
    for part in reversed(parts):
        libc.free(part)  # to the end of the heap, from which later blocks are cut


__all__ = ["keep_freed_memory"]
