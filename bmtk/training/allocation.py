"""Memory that a step frees is kept for the next one, on a CPU."""

import ctypes
import sys
from functools import cache

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
LARGEST = 2**31 - 1  # what an int holds


@cache  # it is called after every step
def keep_freed_memory(device: torch.device) -> None:
    """Where a CPU trains, let this process reuse large blocks that it freed, instead of giving them back to Linux.

    A step allocates the same tensors each time.  By default glibc returns each block of more than 32 MB, and the end
    of its heap, and the kernel clears every page anew when it is written: about a tenth of a step.

    To be called after the first step: what only that one needs would otherwise be kept to the end of the run.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # the C library is glibc
        mallopt(MMAP_THRESHOLD, LARGEST)
        mallopt(TRIM_THRESHOLD, LARGEST)
