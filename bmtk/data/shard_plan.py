"""Which part of a corpus goes into which shard: decided by the files alone, never by who writes them.

A shard has SHARD_BYTES of files, about: small files share one, a large one is divided where that leaves every token as
it is.  Shards that are there already are kept as they are, so that files added at the end cost only themselves.  How a
corpus is divided changes no token and no order: a store is read as if its shards were one.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from .corpus_files import CorpusFile
from .text_files import HEAD_BYTES, UTF8, found_encoding, is_compressed, suffix_of

SHARD_BYTES = 1 << 26
WINDOW = 1 << 20  # bytes in which a place to divide a document is looked for
SAFE_PLACE = re.compile(rb"(?<=[!-~]\n)(?=[!-~])|(?<=[a-z])(?= [a-z])")  # among those of text_cuts, in any encoding
VISIBLE = re.compile(rb"[!-~]")


@dataclass(frozen=True)
class Unit:
    """A file or a part of one, with its size in bytes and a digest of the whole file."""

    file: CorpusFile
    digest: str
    size: int


Group = tuple[Unit, ...]


def plan_shards(
    files: Sequence[tuple[CorpusFile, str]],
    *,
    has_cuts: bool,
    is_kept: Callable[[Group], bool] = lambda group: False,
    kept_sizes: Sequence[int] = (),
) -> list[Group]:
    """The units of each shard, in the order of the files (each with its digest).

    `has_cuts`: whether a document may be divided; `is_kept` says whether a group is a shard already, and `kept_sizes`
    how many units such shards have.
    """
    units = [unit for file, digest in files for unit in _units(file, digest, has_cuts=has_cuts)]
    groups: list[Group] = []
    held: list[Unit] = []
    place = 0
    while place < len(units):
        kept = next((g for n in kept_sizes if is_kept(g := tuple(units[place : place + n]))), None)
        unit = units[place]
        if held and (kept or unit.file.span or sum(u.size for u in held) + unit.size > SHARD_BYTES):
            groups.append(tuple(held))
            held = []
        if kept:
            groups.append(kept)
            place += len(kept)
            continue
        if unit.file.span:
            groups.append((unit,))
        else:
            held.append(unit)
        place += 1
    return [*groups, tuple(held)] if held else groups


def _units(file: CorpusFile, digest: str, *, has_cuts: bool) -> Iterator[Unit]:
    path = Path(file.path)
    size = path.stat().st_size
    borders = [] if size <= SHARD_BYTES else _borders(file, path, size, has_cuts=has_cuts)
    if not borders:
        yield Unit(file, digest, size)
        return
    is_document = suffix_of(path) == ".txt" and file.sample_by == "document"
    share = size // (len(borders) - 1)
    for first, last in pairwise(borders):
        begins, ends = not is_document or first == 0, not is_document or last == size
        yield Unit(dataclasses.replace(file, span=(first, last), begins=begins, ends=ends), digest, share)


def _borders(file: CorpusFile, path: Path, size: int, *, has_cuts: bool) -> list[int]:
    """Where the parts of a large file begin, and the end of the last; none if it cannot be divided."""
    suffix = suffix_of(path)
    if is_compressed(path):
        return []
    if suffix == ".parquet":
        return _row_groups(path)
    if suffix not in (".txt", ".jsonl"):  # a line break in a CSV file may stand within a cell
        return []
    is_document = suffix == ".txt" and file.sample_by == "document"
    with path.open("rb") as content:
        head = content.read(WINDOW)
        if found_encoding(head[:HEAD_BYTES], file.encoding).lower().replace("_", "-") not in UTF8:
            return []
        if is_document and not (has_cuts and VISIBLE.search(head)):
            return []
        find = _safe_place if is_document else _end_of_line
        found = (find(content, place) for place in range(SHARD_BYTES, size, SHARD_BYTES))
        borders = sorted({place for place in found if place is not None and 0 < place < size})
    return [0, *borders, size] if borders else []


def _end_of_line(content: BinaryIO, place: int) -> int | None:
    """The first beginning of a line after `place`; lines are not read whole, as one may be long."""
    content.seek(place)
    while block := content.read(WINDOW):
        if (found := block.find(b"\n")) >= 0:
            return place + found + 1
        place += len(block)
    return None


def _safe_place(content: BinaryIO, place: int) -> int | None:
    content.seek(place)
    found = SAFE_PLACE.search(content.read(WINDOW))
    return place + found.start() if found else None


def _row_groups(path: Path) -> list[int]:
    import pyarrow.parquet  # slow to import, and only needed here

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError):
        return []  # whoever reads it says what is wrong
    borders, held = [0], 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if held and held + size > SHARD_BYTES:
            borders.append(group)
            held = 0
        held += size
    return [*borders, metadata.num_row_groups] if len(borders) > 1 else []
