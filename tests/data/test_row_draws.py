import numpy as np
import pytest

from bmtk.data.row_draws import draws_of_rows, row_draws, seed_words


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 3), (2**32 - 1, 2**31)])
def test_rows_that_are_seeded_together_draw_what_numpy_draws_for_each(seed, epoch):
    rows = [0, 1, 5, 77, 2**32 - 1, 123456, 9, 7, 7]
    words = [np.random.SeedSequence((seed, epoch, row)).generate_state(4, np.uint64) for row in rows]
    assert np.array_equal(seed_words(seed, epoch, rows), words)
    for row, draw in zip(rows, draws_of_rows(seed, epoch, rows), strict=True):
        own = row_draws(seed, epoch, row)
        assert draw.random(5).tolist() == own.random(5).tolist()
        assert draw.integers(10, size=3).tolist() == own.integers(10, size=3).tolist()  # half a word is left over
        assert draw.normal() == own.normal()


@pytest.mark.parametrize("place", [(2**32, 0, 0), (0, 2**32, 0), (0, 0, 2**40)])
def test_numbers_that_numpy_hashes_as_two_words_have_their_own_draws(place):
    seed, epoch, row = place
    found = [draw.random() for draw in draws_of_rows(seed, epoch, [*range(1, 9), row])]
    assert found == [row_draws(seed, epoch, one).random() for one in [*range(1, 9), row]]


def test_a_row_has_the_same_draws_alone_and_among_others():
    rows = list(range(20))
    together = [draw.random() for draw in draws_of_rows(3, 1, rows)]
    assert together == [next(draws_of_rows(3, 1, [row])).random() for row in rows]
    assert list(draws_of_rows(3, 1, [])) == []
