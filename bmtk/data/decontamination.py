"""Training inputs that are also validation or test inputs.

Rows are compared by their fingerprints; running text line by line, because a corpus may be one document, and because
files that share text seldom cut it into the same documents.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from .sources import Texts


class Leaks:
    """Training rows whose input is among the rows of another split.

    `rows` are their places; `sentence` is what was found, in words.
    """

    def __init__(self, train: Sequence[bytes], others: Mapping[str, Sequence[bytes]], *, noun: str = "row"):
        """Fingerprints of the training rows, and of the rows of each other split; `noun` is what a row is called."""
        seen = {mark: f"{split} {noun} {row}" for split, marks in others.items() for row, mark in enumerate(marks, 1)}
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


SHORTEST_LINE = 32  # characters: shorter lines, such as the names in a play, recur without having been copied
TOLERATED_SHARE = 0.01  # of the measured text: set phrases recur in honest corpora, too


class SharedLines:
    """How much of a measured text stands in the training text, in long lines of either.

    `shares` has the part of the characters of each split's lines that occur in the training text; `example` is the
    first such line.  The training text is read once, and only fingerprints of the measured text are kept.
    """

    def __init__(self, train: Iterable[str], measured: Mapping[str, Iterable[str]]):
        # Split -> size of each of its lines, by fingerprint.  Each split by itself: a large validation text would
        # hide that a small test text is trained on.
        self.sizes = {split: {_mark(line): len(line) for line in _lines(texts)} for split, texts in measured.items()}
        marks = set().union(*self.sizes.values())
        self.found: set[bytes] = set()
        self.example = ""
        for line in _lines(train) if marks else ():
            if (mark := _mark(line)) in marks:
                self.found.add(mark)
                self.example = self.example or line

    @property
    def shares(self) -> dict[str, float]:
        return {
            split: sum(sizes[mark] for mark in self.found & sizes.keys()) / max(1, sum(sizes.values()))
            for split, sizes in self.sizes.items()
        }

    def has_line_of(self, text: str) -> bool:
        """Whether a document has a line that is measured on, too."""
        return any(_mark(line) in self.found for line in _lines([text]))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    held = ""
    for text, ends in texts.pieces() if isinstance(texts, Texts) else ((text, True) for text in texts):
        lines = (held + text if held else text).splitlines(keepends=True)
        held = "" if ends or not lines else lines.pop()  # it may go on, or its "\r" be that of "\r\n"
        for line in map(str.strip, lines):
            if len(line) >= SHORTEST_LINE:
                yield line


def _mark(line: str) -> bytes:
    return hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=16).digest()
