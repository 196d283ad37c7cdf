from collections import Counter

import numpy as np
import pytest

from bmtk.data.shuffle import permuted_index


def whole_order(num_rows, seed=0, epoch=0):
    return permuted_index(np.arange(num_rows), num_rows=num_rows, seed=seed, epoch=epoch)


@pytest.mark.parametrize("num_rows", [*range(1, 40), 255, 256, 257, 1000, 65537])
def test_every_row_comes_exactly_once(num_rows):
    for seed, epoch in [(0, 0), (1, 0), (0, 1), (2**70, 12345), (-3, 7)]:
        assert np.array_equal(np.sort(whole_order(num_rows, seed, epoch)), np.arange(num_rows))


def test_a_single_position_is_that_of_the_whole_order():
    whole = whole_order(97, seed=5, epoch=3).tolist()
    alone = [permuted_index(i, num_rows=97, seed=5, epoch=3) for i in range(97)]
    assert alone == whole
    assert all(type(index) is int for index in alone)


def test_positions_and_epochs_may_be_arrays_of_any_shape():
    both = permuted_index(np.arange(6).reshape(2, 3), num_rows=6, seed=1, epoch=np.array([[0], [4]]))
    assert both.shape == (2, 3)
    assert both.dtype == np.int64
    assert both.tolist() == [whole_order(6, 1, 0)[:3].tolist(), whole_order(6, 1, 4)[3:].tolist()]
    assert permuted_index(np.arange(0), num_rows=6, seed=1, epoch=0).tolist() == []


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [whole_order(1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, first in enumerate(orders):
        assert np.sum(first == np.arange(1000)) < 10  # a shuffle has one fixed point on average
        for second in orders[:i]:
            assert np.sum(first == second) < 10


def test_all_orders_of_four_rows_are_equally_likely():
    counts = Counter(tuple(whole_order(4, seed).tolist()) for seed in range(2400))
    assert len(counts) == 24
    assert 60 < min(counts.values()) <= max(counts.values()) < 140  # 100 expected, standard deviation 10


def test_neighbours_are_torn_apart():
    order = whole_order(100_000)
    assert np.mean(np.abs(np.diff(order)) == 1) < 1e-4  # 2e-5 expected
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.01


def test_more_rows_than_memory_could_hold_are_no_trouble():
    positions = 10**15 + 2**33 * np.arange(1000)  # all alike in their lower 32 bits
    rows = permuted_index(positions, num_rows=10**16, seed=0, epoch=0)
    assert len(set(rows.tolist())) == 1000
    assert 0 <= rows.min() < rows.max() < 10**16


@pytest.mark.parametrize(("position", "num_rows"), [(-1, 5), (5, 5), (np.array([0, 7]), 5)])
def test_a_position_outside_is_refused(position, num_rows):
    with pytest.raises(ValueError, match=r"position must lie in \[0, 5\), found"):
        permuted_index(position, num_rows=num_rows, seed=0, epoch=0)


def test_no_rows_have_no_order():
    with pytest.raises(ValueError, match="num_rows=0 cannot be shuffled"):
        permuted_index(0, num_rows=0, seed=0, epoch=0)
