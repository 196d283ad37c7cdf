"""Random numbers of whole batches of rows; each depends on seed, epoch, row and its place in the row alone.

A generator for each row would take as long as all else of a short one: numpy's takes 10 microseconds to seed.  Here a
row has a stream of SplitMix64, whose numbers can be computed in any order (Steele et al. 2014, "Fast splittable
pseudorandom number generators").
"""

import numpy as np

from .shuffle import GOLDEN, WORD, mixed

STEP = np.uint64(GOLDEN)


def row_draws(seed: int, epoch: int, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64: number `places` of row `rows`, whole numbers of shapes that broadcast."""
    first = mixed(np.array([seed & WORD], np.uint64)) + np.array([epoch & WORD], np.uint64) * STEP
    streams = mixed(mixed(first) + rows.astype(np.uint64) * STEP)
    words = mixed(streams + (places.astype(np.uint64) + np.uint64(1)) * STEP)
    return (words >> np.uint64(11)) * 2.0**-53
