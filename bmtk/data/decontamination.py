"""Training inputs that are also validation or test inputs: found by their fingerprints."""

from collections.abc import Mapping, Sequence

import numpy as np


class Leaks:
    """Training rows whose input is among the rows of another split.

    `rows` are their places; `sentence` is what was found, in words.
    """

    def __init__(self, train: Sequence[bytes], others: Mapping[str, Sequence[bytes]], *, noun: str = "row"):
        """Fingerprints of the training rows, and of the rows of each other split; `noun` is what a row is called."""
        seen = {
            mark: f"{split} {noun} {row}" for split, marks in others.items() for row, mark in enumerate(marks, 1)
        }
        self.num_rows = len(train)
        self.rows = [row for row, mark in enumerate(train) if mark in seen]
        self.sentence = ""
        if self.rows:
            first = self.rows[0]
            self.sentence = (
                f"{len(self.rows):,} of {len(train):,} training {noun}s have an input that is among the "
                f"{' or '.join(others)} {noun}s (train {noun} {first + 1} is {seen[train[first]]})"
            )

    @property
    def kept(self) -> np.ndarray:
        """Places of the training rows that are in no other split."""
        return np.setdiff1d(np.arange(self.num_rows), self.rows)
