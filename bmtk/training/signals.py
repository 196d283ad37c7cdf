"""Ending a run from outside: SIGINT and SIGTERM are noted, and obeyed between two steps."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run was asked to stop, and has been saved; the exit code is 128 + the signal's number (130 or 143)."""


class StopRequest:
    """The first SIGINT or SIGTERM that came; `signal_number` is 0 as long as none did."""

    def __init__(self) -> None:
        self.signal_number = 0

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, and 143 where another process received the signal."""
        return 128 + (self.signal_number or signal.SIGTERM)


@contextmanager
def deferred_signals(*, second_stops_at_once: bool) -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM instead of ending the process, as long as the body runs.

    second_stops_at_once: a second signal has its usual effect.  Not for several processes: their launcher passes a
    signal on that the terminal has sent to every process already.  Outside the main thread no signal can be noted.
    """
    request = StopRequest()
    former: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        if request.signal_number:
            if second_stops_at_once:
                signal.signal(number, former[number])
                signal.raise_signal(number)
            return
        request.signal_number = number
        logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
