"""How tokens are spelled: the n-grams of their characters, by which rare words share what others have learned.

Source: Bojanowski et al. 2017, arXiv:1607.04606, section 3.2: n-grams of 3 to 6 characters, the ends being marked.
"""

import zlib
from collections.abc import Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

# A change of these, or of the hash, changes what saved models read when they are trained on.
SIZES = range(3, 7)  # characters


def spelled_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """The text of each token, with what marks a part of a word (## of WordPiece, the space of byte-level BPE).

    Special tokens have none.
    """
    special = set(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [None if token in special else tokenizer.convert_tokens_to_string([token]) for token in tokens]


def most_ngrams(tokens: Sequence[str | None]) -> int:
    """How many n-grams of characters the token has that has most."""
    longest = max((len(token) + 2 for token in tokens if token is not None), default=0)
    return sum(max(0, longest - size + 1) for size in SIZES)


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
