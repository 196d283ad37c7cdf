"""A part of a corpus held out for validation: whole documents, or stretches of a few long ones."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bmtk.errors import UserError

from .corpus_files import Piece
from .sources import Texts

COUNTED = 1000  # documents; more are not counted, and each is held out by its own chance
FEW = 20  # documents: fewer are cut into stretches
STRETCH, MOST_STRETCHES = 4000, 200  # characters of a stretch, about, and how many there are at most
# Where a document may be cut: after a blank line; if there are too few, after a line; else after a word.
CUTS = {
    "blank lines": re.compile(r"\n[^\S\n]*\n\s*"),
    "ends of lines": re.compile(r"\n+"),
    "spaces": re.compile(r"\s+"),
}


@dataclass(frozen=True)
class Share:
    """How much is held out, and by which seed."""

    fraction: float
    seed: int

    def __str__(self) -> str:
        return f"(validation_fraction={self.fraction:g}, seed {self.seed})"


@dataclass(frozen=True)
class HeldOut:
    """The text to train on, the text held out, and in words what was done."""

    train: Texts
    validation: Texts
    note: str


def hold_out(texts: Texts, fraction: float, seed: int) -> HeldOut:
    """Hold out about `fraction` of the documents; which ones depends on the seed and on their number alone.

    A corpus of few documents is cut into stretches of about equal length first.
    Raises: UserError if the text is too short for either.
    """
    lengths = _lengths(texts)
    share = Share(fraction, seed)
    if len(lengths) == COUNTED:
        return _parts(texts, texts.__iter__, _by_chance(share), share, f"{fraction:.1%} of the documents")
    if len(lengths) >= FEW and round(len(lengths) * fraction):
        chosen, count = _chosen(len(lengths), share)
        return _parts(texts, texts.__iter__, chosen, share, f"{count:,} of {len(lengths):,} documents")
    return _of_stretches(texts, sum(lengths), share)


def _lengths(texts: Texts) -> list[int]:
    """Characters of each document, of COUNTED at most."""
    lengths, length = [], 0
    for text, ends in texts.pieces():
        length += len(text)
        if ends:
            lengths.append(length)
            length = 0
            if len(lengths) == COUNTED:
                break
    if not lengths:
        raise texts.emptiness
    return lengths


def _of_stretches(texts: Texts, num_characters: int, share: Share) -> HeldOut:
    fraction = share.fraction
    wanted = max(math.ceil(2 / fraction), min(num_characters // STRETCH, MOST_STRETCHES))
    size = max(1, num_characters // wanted)
    for name, pattern in CUTS.items():

        def pieces(pattern: re.Pattern[str] = pattern) -> Iterator[str]:
            yield from stretches(texts.pieces(), size, pattern)

        found = sum(1 for piece in pieces() if not piece.isspace())
        if found >= wanted // 2 and round(found * fraction):
            chosen, count = _chosen(found, share)
            return _parts(texts, pieces, chosen, share, f"{count:,} of {found:,} stretches of text, cut at {name},")
    raise UserError(
        f"the corpus {texts.name} is too short to hold out {fraction:.0%} of it for validation; name a text that is "
        "not trained on with validation_file, or set a larger validation_fraction"
    )


def stretches(pieces: Iterable[Piece], size: int, pattern: re.Pattern[str]) -> Iterator[str]:
    """Parts of documents of at least `size` characters, each up to the first end of `pattern` after that."""
    held = ""
    for text, ends in pieces:
        held = held + text if held else text
        start = 0
        while len(held) - start > size and (found := pattern.search(held, start + size)):
            if not ends and found.end() == len(held):  # it may go on in the next piece
                break
            yield held[start : found.end()]
            start = found.end()
        held = held[start:]
        if ends:
            if held:
                yield held
            held = ""


def _chosen(count: int, share: Share) -> tuple[Callable[[int], bool], int]:
    number = min(round(count * share.fraction), count - 1)
    places = set(np.random.default_rng([share.seed, count]).choice(count, number, replace=False).tolist())
    return places.__contains__, number


def _by_chance(share: Share) -> Callable[[int], bool]:
    def is_held_out(place: int) -> bool:
        mark = hashlib.blake2b(f"{share.seed} {place}".encode(), digest_size=8).digest()
        return int.from_bytes(mark, "big") < share.fraction * 2**64

    return is_held_out


def _parts(
    texts: Texts,
    units: Callable[[], Iterator[str]],
    is_held_out: Callable[[int], bool],
    share: Share,
    words: str,
) -> HeldOut:
    def part(wanted: bool) -> Texts:
        def documents() -> Iterator[str]:
            visible = (unit for unit in units() if not unit.isspace())
            return (unit for place, unit in enumerate(visible) if is_held_out(place) == wanted)

        name = "held out" if wanted else "trained on"
        mark = hashlib.sha256(f"{texts.fingerprint} {name} {share}".encode()).hexdigest()
        part_of_bytes = share.fraction if wanted else 1 - share.fraction
        num_bytes = None if texts.num_bytes is None else round(texts.num_bytes * part_of_bytes)
        return Texts(f"{texts.name}, the part that is {name}", mark, (documents,), num_bytes, texts.marks)

    return HeldOut(part(False), part(True), f"there is no validation text: {words} are held out {share}")
