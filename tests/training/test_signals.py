"""A run that is asked to stop: at once outside of training, between two steps in it, with an exit code of its own."""

import hashlib
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from bmtk.training import signals
from bmtk.training.loop import StopVote
from bmtk.training.signals import Stopped, StopRequest, deferred_signals, ending_signals, on_stop

CODES = pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)],
    ids=["INT", "TERM", "USR1"],
)


@CODES
def test_a_signal_outside_of_training_ends_the_process_in_order(number, code, caplog):
    former = signal.getsignal(number)
    cleaned = []

    def work():
        try:
            signal.raise_signal(number)
            time.sleep(5)
        finally:
            cleaned.append(True)

    with pytest.raises(Stopped) as stopped, ending_signals():
        work()
    assert stopped.value.code == code
    assert cleaned
    assert f"{signal.Signals(number).name}: stopped; what was saved is whole" in caplog.text
    assert signal.getsignal(number) is former


@CODES
def test_a_process_that_is_busy_outside_of_python_is_ended(number, code, monkeypatch):
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with ending_signals():
                os.write(writing, b"x")
                hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes, without a look at signals
        except Stopped as stopped:  # the signal came before
            os._exit(stopped.code)
        os._exit(0)
    os.read(reading, 1)
    time.sleep(0.1)
    started = time.monotonic()
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert time.monotonic() - started < 30


@CODES
def test_a_signal_in_training_is_noted_and_a_second_sigterm_changes_nothing(number, code):
    with ending_signals(), deferred_signals(second_stops_at_once=True) as request:
        assert not request
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert request
        assert request.exit_code == code


def test_ctrl_c_twice_in_training_stops_at_once():
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(5)

    with pytest.raises(Stopped), ending_signals(), deferred_signals(second_stops_at_once=True):
        press_twice()


def test_the_end_of_the_time_is_a_request_too(monkeypatch, caplog):
    monkeypatch.setattr(signals, "STARTED", time.monotonic() - 90)
    assert not StopRequest()
    assert not StopRequest(max_minutes=2)
    request = StopRequest(max_minutes=1)
    assert [bool(request), bool(request), request.exit_code] == [True, True, 124]
    assert caplog.text.count("max_minutes=1 are over: finishing this step") == 1
    request.signal_number = signal.SIGINT
    assert request.exit_code == 130


def test_work_is_saved_only_if_a_signal_ends_what_follows_it():
    saved = []
    for error in (ValueError, Stopped):
        with pytest.raises(error), on_stop(lambda: saved.append(True)):
            raise error
    assert saved == [True]


@pytest.mark.parametrize(("device", "answers"), [("cpu", [False, True, True]), ("cuda", [False, False, True])])
def test_several_processes_stop_after_the_same_step(device, answers):
    """On GPUs by the vote of the step before, whose value is there without waiting."""
    vote = StopVote(StopRequest(), SimpleNamespace(num_processes=2, device=SimpleNamespace(type=device)))
    votes = [torch.tensor(count) for count in (0, 1, 1)]
    assert [vote.says_stop(SimpleNamespace(stop_requests=count)) for count in votes] == answers
