"""What data are, by content: fingerprints of rows and files, and in what two sets of data differ."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from bmtk.files import read_json, sha256, write_json

from .archives import member_bytes
from .columns import cells

MARK_BYTES = 6  # of a row in the record of a run: two rows are taken for the same in one of 3e14 cases

Marks = Mapping[str, Sequence[str]]  # split -> a mark of each row or file, which differs where the content does


def fingerprints(rows: Dataset, columns: Sequence[str]) -> list[bytes]:
    """A hash of each row's values in `columns`; files are read, so a copy under another name counts as the same."""
    return [_hash(row) for row in zip(*(cells(rows, column) for column in columns), strict=True)]


def _hash(values: Sequence[object]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        content = _content(value)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()


def _content(value: object) -> bytes:
    if isinstance(value, dict) and {"bytes", "path"} <= value.keys():  # an image or a recording that is not decoded
        content = value["bytes"] if value["bytes"] is not None else member_bytes(value["path"])
        return Path(value["path"]).read_bytes() if content is None else content
    return json.dumps(value, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")


def row_marks(rows: Dataset) -> list[str]:
    """A short fingerprint of all that a row holds, for each row."""
    return [mark[:MARK_BYTES].hex() for mark in fingerprints(rows, rows.column_names)]


def differences(former: Marks, now: Marks, *, unit: str) -> list[str]:
    """In what the splits differ, in words ("train: 2 rows added, 1 removed"); an empty list if they are the same."""
    found = [(split, _difference(former.get(split), now.get(split), unit)) for split in {**former, **now}]
    return [f"{split}: {what}" for split, what in found if what]


def _difference(former: Sequence[str] | None, now: Sequence[str] | None, unit: str) -> str:
    if former is None or now is None:
        return f"there were no {unit}s" if former is None else f"there are no {unit}s any more"
    if list(former) == list(now):
        return ""
    added, removed = Counter(now) - Counter(former), Counter(former) - Counter(now)
    if not added and not removed:
        return f"the {unit}s are in another order"
    if len(former) == len(now):
        places = [place for place, (old, new) in enumerate(zip(former, now, strict=True), start=1) if old != new]
        if len(places) == added.total():
            return f"{len(places):,} of {len(now):,} {unit}s changed, first {unit} {places[0]:,}"
    parts = [f"{count.total():,} {unit}s {what}" for count, what in ((added, "added"), (removed, "removed")) if count]
    return f"{' and '.join(parts)} ({len(former):,} before, {len(now):,} now)"


class FileDigests:
    """The SHA-256 of files; a file is read again only when its size or its time of change is another.

    What is known is kept in the file `cache`, if one is named.  may_read=False never reads a file, and marks one
    that is not known by its size and time.
    """

    def __init__(self, cache: Path | None = None, *, may_read: bool = True):
        self.cache, self.may_read = cache, may_read
        known = read_json(cache) if cache else None
        self.known: dict[str, list[object]] = known if isinstance(known, dict) else {}

    def of(self, path: Path) -> str:
        name, facts = str(path.resolve()), path.stat()
        stamp = [facts.st_size, facts.st_mtime_ns]
        if (found := self.known.get(name)) and found[:2] == stamp:
            return str(found[2])
        if not self.may_read:
            return f"unread {stamp}"
        digest = sha256(path)
        self.known[name] = [*stamp, digest]
        if self.cache:
            write_json(self.cache, self.known)
        return digest
