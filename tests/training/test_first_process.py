"""The main process does long work first, and no barrier waits for it."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bmtk.training.first_process import main_process_first

PATIENCE = 0.3  # seconds after which a barrier breaks, as that of NCCL does after ten minutes


def run(folder, work, *, count=3):
    """Run `work(rank)` in `count` threads that stand for processes."""
    barrier, errors = threading.Barrier(count), []

    def process(rank):
        def wait_for_everyone():
            barrier.wait(timeout=PATIENCE)

        facts = {"num_processes": count, "is_main_process": rank == 0, "wait_for_everyone": wait_for_everyone}
        try:
            with main_process_first(SimpleNamespace(**facts), folder):
                work(rank)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_the_others_wait_longer_than_a_barrier_would(tmp_path):
    seen = []

    def work(rank):
        if rank == 0:
            time.sleep(3 * PATIENCE)
        seen.append(rank)

    assert run(tmp_path, work) == []
    assert seen[0] == 0
    assert sorted(seen) == [0, 1, 2]


def test_a_main_process_that_fails_lets_the_others_go_on(tmp_path):
    seen = []

    def work(rank):
        seen.append(rank)
        if rank == 0:
            raise ValueError("no data")

    assert [str(error) for error in run(tmp_path, work)] == ["no data"]
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize(("count", "entered"), [(1, 0), (2, 1)])
def test_short_work_needs_no_folder(count, entered):
    times = []

    @contextmanager
    def barrier():
        times.append(None)
        yield

    with main_process_first(SimpleNamespace(num_processes=count, main_process_first=barrier), None):
        assert len(times) == entered
