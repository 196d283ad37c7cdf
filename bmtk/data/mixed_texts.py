"""Documents of several corpora, which are stored apart."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from .corpus_files import Piece
from .held_out_texts import HeldOut, hold_out
from .sources import Texts, text_fingerprint


@dataclass(frozen=True)
class MixedTexts(Texts):
    """The documents of all corpora, one corpus after the other; `members` has those of each, by name."""

    members: tuple[tuple[str, Texts], ...] = ()
    sampled: tuple[float, ...] = ()  # the part of each corpus that was read; all of it if empty

    def pieces(self) -> Iterator[Piece]:
        for _, texts in self.members:
            yield from texts.pieces()

    def without(self, is_left_out: Callable[[str], bool], *, mark: str) -> "MixedTexts":
        return mixed({name: texts.without(is_left_out, mark=mark) for name, texts in self.members})

    def sample(self, num_characters: int) -> "MixedTexts":
        """The beginning of each corpus, of equal size, for a plan; this itself if it is small."""
        share = max(1, num_characters // len(self.members))
        found = [_sample(texts, share) for _, texts in self.members]
        if all(part == 1.0 for _, part in found):
            return self
        names = [name for name, _ in self.members]
        texts = mixed(dict(zip(names, (text for text, _ in found), strict=True)))
        return replace(texts, sampled=tuple(part for _, part in found))


def _sample(texts: Texts, num_characters: int) -> tuple[Texts, float]:
    """The first `num_characters` of `texts`, and which part of it they are (1 where its size is not known)."""
    head = texts.head(num_characters)
    num_bytes = sum(len(text.encode()) for text in head)
    if sum(map(len, head)) < num_characters:
        return texts, 1.0
    part = min(1.0, num_bytes / texts.num_bytes) if texts.num_bytes else 1.0
    return Texts(texts.name, text_fingerprint(head), (head.__iter__,), num_bytes, texts.marks), part


def hold_out_of_each(texts: MixedTexts, own: Mapping[str, Texts], fraction: float, seed: int) -> HeldOut:
    """Hold out a part of every corpus that has no validation text of its `own`.  Raises: as `hold_out`."""
    found = {name: hold_out(member, fraction, seed) for name, member in texts.members if name not in own}
    train = mixed({name: found[name].train if name in found else member for name, member in texts.members})
    measured = mixed({name: found[name].validation if name in found else own[name] for name, _ in texts.members})
    return HeldOut(train, measured, "; ".join(f"{name}: {part.note}" for name, part in found.items()))


def mixed(members: Mapping[str, Texts]) -> MixedTexts:
    """The corpora `members` as one text."""
    texts = list(members.values())
    sizes = [one.num_bytes for one in texts]
    is_of_files = all(one.files for one in texts)
    return MixedTexts(
        name=", ".join(one.name for one in texts),
        fingerprint=hashlib.sha256(
            json.dumps([[n, one.fingerprint] for n, one in members.items()]).encode()
        ).hexdigest(),
        parts=tuple(part for one in texts for part in one.parts),
        num_bytes=None if None in sizes else sum(size for size in sizes if size),
        marks=tuple(mark for one in texts for mark in one.marks),
        files=tuple(file for one in texts for file in one.files) if is_of_files else (),
        members=tuple(members.items()),
    )
