"""Ending a run from outside: signals and a limit of time, obeyed between two steps, outside of training at once."""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bmtk.process import launcher_options, words_of

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what Slurm can send before its time limit
TIME_IS_OVER = 124  # exit code after max_minutes; that of timeout(1)
GRACE_SECONDS = 10.0  # until a process that is busy outside of Python is ended
PR_SET_PDEATHSIG = 1  # of prctl(2)
STARTED = time.monotonic()


class Stopped(SystemExit):
    """The run was asked to stop, and has been saved as far as it had come.

    Its exit code is 128 + the signal's number (130, 138 or 143), or 124 after `max_minutes`.
    """


class StopRequest:
    """The first signal that came, the end of the time that a run may take, or a save that has failed."""

    def __init__(self, max_minutes: float | None = None, save_failed: Callable[[], bool] = lambda: False):
        self.signal_number = 0  # 0 as long as none came
        self.max_minutes, self.save_failed = max_minutes, save_failed
        self.is_noted = False

    def __bool__(self) -> bool:
        """Whether the run is to stop."""
        if self.signal_number or not self.time_is_over:
            return self.signal_number != 0 or self.save_failed()
        if not self.is_noted:
            logger.warning("max_minutes=%g are over: finishing this step, then saving", self.max_minutes)
        self.is_noted = True
        return True

    @property
    def time_is_over(self) -> bool:
        """Whether the process has run for `max_minutes`."""
        return self.max_minutes is not None and time.monotonic() - STARTED >= 60 * self.max_minutes

    @property
    def exit_code(self) -> int:
        """Also for a process that was asked to stop by another one: its launcher reports the first it sees."""
        if self.signal_number or not self.time_is_over:
            return 128 + (self.signal_number or signal.SIGTERM)
        return TIME_IS_OVER


def stopped(request: StopRequest, step: int, total: int, *, saved: bool = True) -> Stopped:
    """What ends a run that was asked to stop, after a line that says how to go on."""
    remedy = "saved; run the same command again to resume" if saved else "nothing was saved, as this run saves nothing"
    logger.warning("stopped after step %d of %d: %s", step, total, remedy)
    return Stopped(request.exit_code)


@contextmanager
def deferred_signals(
    *,
    second_stops_at_once: bool,
    max_minutes: float | None = None,
    save_failed: Callable[[], bool] = lambda: False,
) -> Iterator[StopRequest]:
    """Note a signal instead of ending the process, as long as the body runs.

    second_stops_at_once: Ctrl-C once more stops without saving.  Not for several processes: their launcher passes a
    signal on that the terminal has sent to every process already.  (Another SIGTERM has no effect: the system sends
    one for each thread of a launcher that ends.)  Outside the main thread no signal can be noted.
    """
    request = StopRequest(max_minutes, save_failed)

    def note(number: int, former: Any) -> None:
        if not request.signal_number:
            request.signal_number = number
            logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        elif second_stops_at_once and number == request.signal_number == signal.SIGINT:
            signal.signal(number, former)
            signal.raise_signal(number)

    with _handled_by(note):
        yield request


@contextmanager
def ending_signals() -> Iterator[None]:
    """End the process in order when a signal comes, as long as the body runs: by `Stopped`, within `GRACE_SECONDS`.

    The handler of a signal runs between two instructions of Python, and training a tokenizer, say, is one of them: a
    thread ends the process if it has not come to its handler in time.  Whatever bmtk writes is either whole or absent
    then.
    """
    end_with_launcher()
    reached = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def stop(number: int, former: Any) -> None:
        if reached.is_set() and number != signal.SIGINT:
            return
        reached.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C once more: at once
        logger.warning("%s: stopped; what was saved is whole, and the same command goes on", _name(number))
        raise Stopped(128 + number)

    def watch() -> None:
        for number in iter(lambda: os.read(reading, 1)[0], 0):
            if number in SIGNALS and not is_deferred() and not reached.wait(GRACE_SECONDS) and not is_deferred():
                sys.stderr.write(f"{_name(number)}: stopped\n")
                os._exit(128 + number)

    def is_deferred() -> bool:
        return signal.getsignal(signal.SIGTERM) is not mine

    with _handled_by(stop):
        mine = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(former)
            os.write(writing, bytes(1))


@contextmanager
def on_stop(save: Callable[[], None]) -> Iterator[None]:
    """Call `save` if a signal ends the body, so that what was done before it is not lost."""
    try:
        yield
    except Stopped:
        save()
        raise


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler(number, former handler)` for each of `SIGNALS`, in the main thread."""
    former: dict[int, Any] = {}

    def call(number: int, frame: object) -> None:
        handler(number, former[number])

    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, call) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in former.items():
            signal.signal(number, handler_before)


def end_with_launcher() -> None:
    """Have the system send SIGTERM when `accelerate launch` ends, which does not pass on its own (Linux only).

    Only then: a process that was started by a shell is to outlive it.
    Raises: Stopped if the launcher has ended already, while modules were imported.
    """
    if not sys.platform.startswith("linux"):
        return
    is_orphan = os.getppid() == 1 and os.getpgrp() != 1  # of a container, 1 may be the shell that has started it
    if is_orphan and "ACCELERATE_MIXED_PRECISION" in os.environ:
        logger.warning("accelerate launch has ended: stopped")
        raise Stopped(128 + signal.SIGTERM)
    if launcher_options(words_of(os.getppid(), "cmdline"), sys.argv):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _name(number: int) -> str:
    return signal.Signals(number).name
