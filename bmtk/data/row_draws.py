"""The random numbers of B rows, as functions of (seed, epoch, row): numpy's, of many rows at once.

numpy makes a generator in two steps: `SeedSequence` hashes the numbers of its seed, and PCG64 starts from what comes
of that.  Sources: O'Neill 2015, "Developing a seed_seq alternative" (the hash); O'Neill 2014, "PCG" (XSL-RR 128/64).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

FEWEST = 8  # rows that are worth it
HASH, HASH_OUT = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED)  # first constant, and factor to the next
MIX = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
STEP, WORD = 0x2360ED051FC65DA44385DF649FCCF645, 2**128 - 1  # factor of PCG64's state, and the bits that it keeps


def row_draws(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The random numbers of one row in one epoch."""
    return np.random.default_rng((seed, int(epoch), int(row)))


def draws_of_rows(seed: int, epoch: int, rows: Sequence[int]) -> Iterator[np.random.Generator]:
    """`row_draws` of each row, in a fifth of the time; each is to be drawn from before the next one is asked for."""
    if len(rows) < FEWEST or not 0 <= min(seed, epoch, *rows) <= max(seed, epoch, *rows) < 2**32:
        yield from (row_draws(seed, epoch, row) for row in rows)
        return
    draw = np.random.default_rng(0)
    state: Any = draw.bit_generator.state
    for high, low, step_high, step_low in seed_words(seed, epoch, rows).tolist():
        step = (step_high << 65 | step_low << 1 | 1) & WORD
        state["state"] = {"state": ((step + (high << 64 | low)) * STEP + step) & WORD, "inc": step}
        draw.bit_generator.state = state
        yield draw


def seed_words(seed: int, epoch: int, rows: Sequence[int]) -> np.ndarray:
    """(B, 4): `SeedSequence((seed, epoch, row)).generate_state(4, np.uint64)` of each row; all are below 2**32."""
    pool = np.zeros((4, len(rows)), np.uint32)
    pool[0], pool[1], pool[2] = seed, epoch, rows
    pool = hashed(pool, CONSTANTS[:5])
    for source in range(4):
        others, first = [place for place in range(4) if place != source], 4 + 3 * source
        mixed = pool[others] * MIX[0] - hashed(pool[source], CONSTANTS[first : first + 4]) * MIX[1]
        pool[others] = mixed ^ mixed >> 16
    words = hashed(np.tile(pool, (2, 1)), CONSTANTS_OUT)
    return np.ascontiguousarray(words.T).astype("<u4").view("<u8")


def hashed(values: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """Numbers (N, B), or (B,) for all, hashed by N of the N + 1 `constants` and the one after each."""
    found = (values ^ constants[:-1]) * constants[1:]
    return found ^ found >> 16


def hash_constants(first: int, factor: int, count: int) -> np.ndarray:
    """(count, 1): each is the one before it times `factor`."""
    return np.array([[first * pow(factor, power, 2**32) % 2**32] for power in range(count)], np.uint32)


CONSTANTS, CONSTANTS_OUT = hash_constants(*HASH, 17), hash_constants(*HASH_OUT, 9)
