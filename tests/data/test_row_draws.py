"""Random numbers of rows: one for each place, whatever is asked for beside it."""

import numpy as np
import pytest

from bmtk.data.row_draws import row_draws


def test_a_number_depends_on_seed_epoch_row_and_place_alone():
    rows, places = np.arange(6)[:, None], np.arange(9)
    found = row_draws(7, 2, rows, places)  # (6, 9)
    assert found[4, 5] == row_draws(7, 2, np.array([4]), np.array([5]))[0]
    others = [row_draws(8, 2, rows, places), row_draws(7, 3, rows, places), row_draws(-7, 2, rows, places)]
    assert len({*found.ravel(), *(value for other in others for value in other.ravel())}) == 4 * 54


def test_numbers_are_spread_evenly_and_neighbours_have_nothing_in_common():
    found = row_draws(0, 0, np.arange(400)[:, None], np.arange(400))
    assert 0 <= found.min() < found.max() < 1
    counts = np.histogram(found, bins=100, range=(0, 1))[0]
    assert ((counts - 1600) ** 2 / 1600).sum() == pytest.approx(99, abs=45)  # chi-square of 99 degrees: 99 +- 14
    epochs = row_draws(0, 1, np.arange(400)[:, None], np.arange(400))
    pairs = [(found[1:], found[:-1]), (found[:, 1:], found[:, :-1]), (found, epochs)]
    assert all(abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01 for one, other in pairs)
