"""Data sets as tar archives laid out as WebDataset does: the files of a row share a name up to its first point.

    000017.jpg  000017.cls  000017.json

Archives are listed once and never unpacked: a row names the place of its image or recording in the archive, so that
memory does not grow with what they hold, and any row can be read at once.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmtk.errors import UserError

SUFFIX = ".tar"
MEMBER = re.compile(r"(.+\.tar)!(\d+)\+(\d+)!.+", re.DOTALL)  # archive, first byte, number of bytes, name
LABEL, TEXT, FIELDS = "cls", "txt", "json"  # suffixes of what is no image and no recording


def member_bytes(path: str) -> bytes | None:
    """The content of a file in an archive, for a path that `archive_rows` has made; None for any other path."""
    found = MEMBER.fullmatch(path)
    if found is None:
        return None
    with open(found[1], "rb") as archive:
        archive.seek(int(found[2]))
        return archive.read(int(found[3]))


def archive_rows(paths: Sequence[Path], kinds: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of all archives, in their order; `kinds` says which suffixes are of an image or a recording.

    An image is {"bytes": None, "path": its place}; `.cls` is the column label, `.txt` text, and every key of `.json` a
    column.  What else a row has is left out.
    Raises: UserError for a file that is no archive, or a damaged or cut one, and a row with two images.
    """
    for path in paths:
        yield from _rows(path, kinds)


def _rows(path: Path, kinds: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {}
    former, name = None, ""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them, a kilobyte each
                name = member.name.removeprefix("./")
                key, suffix = _key_and_suffix(name)
                if not member.isfile() or not suffix or name.rpartition("/")[2].startswith("."):
                    continue
                if key != former and row:
                    yield row
                    row = {}
                former = key
                found = _fields(path, archive, member, suffix, kinds)
                if twice := found.keys() & row.keys():
                    raise UserError(f"{path}: row {key} has {', '.join(sorted(twice))} twice; leave one of them out")
                row |= found
            _check_end(path, archive.offset)
    except tarfile.TarError as error:
        if name:
            raise UserError(
                f"{path} is damaged or cut off at or after {name} ({error}); copy or pack it again"
            ) from error
        raise UserError(
            f"{path} is not a tar archive that can be read ({error}); unpack it if it is compressed"
        ) from error
    if row:
        yield row


def _check_end(path: Path, offset: int) -> None:
    """Raise TarError if an archive does not end where tarfile does: it takes a damaged header for the end."""
    with open(path, "rb") as archive:
        archive.seek(offset)
        block = archive.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("no file and no end of the archive follows")


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _fields(
    path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, kinds: Mapping[str, str]
) -> dict[str, Any]:
    """The columns that one file of a row gives."""
    if kind := kinds.get(f".{suffix.rpartition('.')[2]}"):
        return {kind: {"bytes": None, "path": f"{path}!{member.offset_data}+{member.size}!{member.name}"}}
    if suffix not in (LABEL, TEXT, FIELDS):
        return {}
    content = archive.extractfile(member)
    assert content is not None  # of a regular file
    try:
        text = content.read().decode()
        if suffix == FIELDS:
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("it holds no object")
            return fields
    except ValueError as error:
        raise UserError(f"{path}: {member.name} cannot be read: {error}") from error
    return {"label" if suffix == LABEL else "text": text.strip()}
