"""Rows made by several threads are those that one makes."""

import threading
import time

import pytest
import torch

from bmtk.data.threads import side_by_side


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_rows_are_in_order_and_made_by_other_threads(two_threads):
    def late_first(row, name):
        time.sleep(0.02 if row == 0 else 0.0)
        return f"{name}{row}", threading.get_ident()

    found = side_by_side(late_first, range(4), "abcd")
    assert [text for text, _ in found] == ["a0", "b1", "c2", "d3"]
    assert len({thread for _, thread in found}) == 2
    assert threading.get_ident() not in {thread for _, thread in found}


def test_an_error_of_a_row_is_raised(two_threads):
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda row: 1 // row, [1, 0, 1])


def test_one_thread_makes_them_itself(two_threads):
    torch.set_num_threads(1)
    assert side_by_side(lambda row: threading.get_ident(), range(2)) == [threading.get_ident()] * 2
