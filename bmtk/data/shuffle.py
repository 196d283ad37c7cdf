"""The order of rows: a shuffle of any length that is never stored, so that any place of it can be looked up at once.

Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", methods "generalized Feistel" and "cycle
walking"; the round function is the finalizer of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
generators"). It mixes well enough to shuffle data; it keeps no secrets.
"""

from math import isqrt
from typing import overload

import numpy as np

NUM_ROUNDS = 8
WORD = 0xFFFFFFFFFFFFFFFF
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: SplitMix64's step


@overload
def permuted_index(position: int, *, num_rows: int, seed: int, epoch: int) -> int: ...


@overload
def permuted_index(position: np.ndarray, *, num_rows: int, seed: int, epoch: int | np.ndarray) -> np.ndarray: ...


def permuted_index(
    position: int | np.ndarray, *, num_rows: int, seed: int, epoch: int | np.ndarray
) -> int | np.ndarray:
    """Row at `position` of the shuffled order of `epoch`: for each (seed, epoch) a bijection on [0, num_rows).

    `position` and `epoch` may be integer arrays of shapes that broadcast; the result is then an int64 array.
    Takes O(1) time and memory for each position, whatever `num_rows` is.
    Raises: ValueError if num_rows < 1, or a position lies outside [0, num_rows).
    """
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows} cannot be shuffled; there must be at least one row")
    position, epoch = np.broadcast_arrays(np.asarray(position, np.int64), np.asarray(epoch, np.int64))
    if position.size and not 0 <= position.min() <= position.max() < num_rows:
        raise ValueError(f"position must lie in [0, {num_rows}), found {position.min()} to {position.max()}")
    keys = _round_keys(seed, epoch.reshape(-1))
    index = _feistel(position.reshape(-1).astype(np.uint64), keys, num_rows)
    while (outside := index >= num_rows).any():  # walk the cycle on until it is back inside
        index[outside] = _feistel(index[outside], keys[:, outside], num_rows)
    index = index.astype(np.int64).reshape(position.shape)
    return index if index.ndim else int(index)


def _feistel(x: np.ndarray, keys: np.ndarray, num_rows: int) -> np.ndarray:
    """Permute [0, width * height), the smallest near-square that holds num_rows: x (N,), keys (NUM_ROUNDS, N)."""
    width = isqrt(num_rows - 1) + 1
    height = -(-num_rows // width)
    left, right = x % np.uint64(width), x // np.uint64(width)
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right ^ key) % np.uint64(width)) % np.uint64(width)
        else:
            right = (right + _mix(left ^ key) % np.uint64(height)) % np.uint64(height)
    return right * np.uint64(width) + left


def _round_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """Keys (NUM_ROUNDS, N) that differ in every bit between seeds, epochs and rounds."""
    start = _mix(np.array([seed & WORD], np.uint64)) + epoch.astype(np.uint64) * np.uint64(GOLDEN)
    rounds = np.array([i * GOLDEN & WORD for i in range(1, NUM_ROUNDS + 1)], np.uint64)
    return _mix(_mix(start) + rounds[:, None])


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: each bit of `x` changes about half of the result.  Products wrap at 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
