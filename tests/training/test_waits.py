"""A wait for other processes that takes too long says what was waited for, and for whom."""

import json
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from tiny_run import arguments

from bmtk.errors import UserError
from bmtk.training.waits import named_waits

LATE = "[unbound_buffer.cc:81] Timed out waiting 300ms for recv operation to complete"
LOST = "[pair.cc:553] Connection closed by peer [127.0.0.1]:10121"


@pytest.fixture
def store(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    return store


def process(rank: int, count: int = 3) -> SimpleNamespace:
    handler = SimpleNamespace(timeout=timedelta(seconds=0.3))
    return SimpleNamespace(process_index=rank, num_processes=count, init_handler=handler)


def fail(accelerator, message: str) -> None:
    with named_waits(accelerator, "the run"), named_waits(accelerator, lambda: "step 7"):
        raise RuntimeError(message)


def test_the_processes_that_do_not_wait_are_named(store):
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        fail(process(2), LOST)  # of one that waits no longer, so that this one lost it
    with pytest.raises(
        UserError, match=r"waited 0.3 seconds \(timeout_minutes=0.005\) .* in step 7 \(.*process 1 of 3 has"
    ):
        fail(process(0), LATE)


def test_where_all_wait_each_is_named_with_its_place(store):
    for rank, where in ((1, "step 7, on a"), (2, "the evaluation after step 6, on b")):
        store.set(f"bmtk-waits/{rank}", json.dumps(where))
    with pytest.raises(
        UserError, match="process 1 waits in step 7, on a; process 2 waits in the evaluation after step 6"
    ):
        fail(process(0), LATE)


def test_other_errors_and_those_of_a_single_process_stay_what_they_are(store):
    for accelerator, message in ((process(0), "shapes do not fit"), (process(0, 1), LATE)):
        with pytest.raises(RuntimeError, match=message[-20:]):
            fail(accelerator, message)
    assert not store.check(["bmtk-waits/0"])


def test_without_a_store_nobody_is_named(monkeypatch):
    with pytest.raises(UserError, match="which ones is not known"):  # no group of processes has been made here
        fail(process(0), LATE)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("inf"), float("nan")])
def test_a_time_out_is_a_number_above_0(minutes, tmp_path):
    with pytest.raises(UserError, match=r"timeout_minutes=.* is out of range; give a number above 0"):
        arguments(tmp_path, timeout_minutes=minutes)
