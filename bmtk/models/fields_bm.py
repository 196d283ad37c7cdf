"""Fields of a configuration, with their help text."""

import dataclasses
from typing import Any


def described(default: object, help: str) -> Any:
    """A configuration field with its help text: what it is, and its unit.

    `help` ends in "default: ..." where `default` is None, because None then stands for a value that is computed.
    """
    return dataclasses.field(default=default, metadata={"help": help})


class AudioTimes:
    """Base of a configuration with `hop_length`: how far apart the positions of a recording are."""

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one position to the next, four frames; pipelines compute word times and chunks with it."""
        return 4 * self.hop_length


def check_ngrams(sizes: list[int], skip: int, buckets: int, spelling: int) -> None:
    """Raise ValueError for n-grams of no token, or a table of a negative size."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"ngram_sizes={sizes} must be numbers of at least 1 token, and one at least")
    if skip < 0:
        raise ValueError(f"ngram_skip={skip} must be at least 0, which is no token between those of a pair")
    if buckets < 0:
        raise ValueError(f"ngram_buckets={buckets} must be at least 0, which is no table")
    if spelling < 0:
        raise ValueError(f"ngram_spelling={spelling} must be at least 0, which is no n-gram of characters")


__all__ = ["AudioTimes", "check_ngrams", "described"]
