"""The text that a tokenizer is trained on: all of a corpus, or a part drawn from everywhere in it."""

import hashlib
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from .held_out_texts import CUTS, stretches
from .sources import Texts
from .text_cuts import PIECE_CHARACTERS, cut_pieces
from .tokenizers import CUT_KINDS

SAMPLE_MB = 100  # of UTF-8; the vocabulary of a larger sample hardly differs
SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True)
class Sample:
    """Parts of documents, in the order of the corpus, and the sizes in bytes of UTF-8 of the sample and the corpus."""

    parts: tuple[bytes, ...]
    num_bytes: int
    corpus_bytes: int

    def __iter__(self) -> Iterator[str]:
        return (part.decode() for part in self.parts)

    def __str__(self) -> str:
        if self.num_bytes == self.corpus_bytes:
            return f"all of the training text, {self.num_bytes / 1e6:,.1f} MB"
        return (
            f"{self.num_bytes / 1e6:,.1f} of {self.corpus_bytes / 1e6:,.1f} MB of training text, drawn from all of it"
        )


def units_of(texts: Texts | Sequence[str], kind: str) -> Iterator[str]:
    """The documents, long ones cut where a tokenizer of this kind has the same words on both sides of the cut."""
    if not isinstance(texts, Texts):
        yield from texts
    elif kind in CUT_KINDS:
        yield from (text for text, _ in cut_pieces(texts.pieces(), PIECE_CHARACTERS))
    else:
        yield from stretches(texts.pieces(), PIECE_CHARACTERS, CUTS["spaces"])


def draw_sample(units: Iterable[str], num_bytes: int) -> Sample:
    """Those units with the smallest marks, a hash of their places, that have `num_bytes` or one unit more.

    The units are read once, and no more than the sample is held: the number of bytes need not be known before.
    """
    chosen: list[tuple[int, int, bytes]] = []  # a heap, the largest mark first
    size = total = 0
    for place, unit in enumerate(units):
        content = unit.encode()
        total, size = total + len(content), size + len(content)
        heapq.heappush(chosen, (-_mark(place), place, content))
        while size - len(chosen[0][2]) >= num_bytes:
            size -= len(heapq.heappop(chosen)[2])
    chosen.sort(key=lambda entry: entry[1])
    return Sample(tuple(content for _, _, content in chosen), size, total)


def _mark(place: int) -> int:
    return int.from_bytes(hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8).digest(), "little")


def counted(units: Iterable[str], of_bytes: int | None, log: Callable[[str], None]) -> Iterator[str]:
    """The same units, with a line about how much of `of_bytes` was read now and then."""
    began = shown = time.monotonic()
    size = 0
    for unit in units:
        yield unit
        size += len(unit) if unit.isascii() else len(unit.encode())
        if (now := time.monotonic()) - shown >= SECONDS:
            shown = now
            whole = f" of {of_bytes / 1e6:,.0f}" if of_bytes else ""
            log(f"read {size / 1e6:,.0f}{whole} MB, {size / 1e6 / (now - began):,.0f} MB/s")
