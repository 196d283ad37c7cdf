"""Processes of one run that are forked from a test, which has imported everything: quicker than to start them."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState


def forked(work: Callable[[int], None], count: int = 2, *, seconds: int = 60) -> list[int]:
    """Exit statuses of processes that call work(rank); minus the signal that ended one, 99 after an exception.

    When one has failed the others are ended, as a launcher does it; and each of them after so many `seconds`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_in_child(rank, count, port, work, seconds) for rank in range(count)]
    statuses: dict[int, int] = {}
    while len(statuses) < count:
        time.sleep(0.01)
        for child in set(children) - set(statuses):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
            elif any(statuses.values()):
                os.kill(child, signal.SIGKILL)
    return [statuses[child] for child in children]


def _in_child(rank: int, count: int, port: int, work: Callable[[int], None], seconds: int) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which no child uses
        child = os.fork()
    if child:
        return child
    code = 99
    try:
        signal.alarm(seconds)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(1)
        work(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
