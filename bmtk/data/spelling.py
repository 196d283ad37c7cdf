"""How tokens are spelled: the n-grams of their characters, by which rare words share what others have learned.

Source: Bojanowski et al. 2017, arXiv:1607.04606, section 3.2: n-grams of 3 to 6 characters, the ends being marked.
"""

import zlib
from collections.abc import Sequence
from itertools import islice

import numpy as np

SIZES = range(3, 7)  # characters


def spelling_table(tokens: Sequence[str | None], width: int, buckets: int) -> np.ndarray:
    """(V, width) int32: numbers from 1 to `buckets` for the n-grams of each token, the short ones first, then 0.

    Tokens that stand for no text are None.  The numbers are hashes, the same in every process.

    >>> spelling_table(["in", None], 4, 1000).tolist()  # <in, in>, <in>
    [[616, 496, 537, 0], [0, 0, 0, 0]]
    """
    table = np.zeros((len(tokens), width), np.int32)
    for row, token in zip(table, tokens, strict=True):
        spelled = "" if token is None else f"<{token}>"
        ngrams = (spelled[start : start + size] for size in SIZES for start in range(len(spelled) - size + 1))
        found = [1 + zlib.crc32(ngram.encode()) % buckets for ngram in islice(ngrams, width)]
        row[: len(found)] = found
    return table
