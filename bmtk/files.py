"""Files and folders that are never half there: written beside their place, flushed to the disk, renamed into it.

A rename replaces a file in one step, so a kill leaves either the former content or the new one.  Without the flush
before it, a power cut could leave the new name on an empty file; without the flush of the parent folder after it, the
former file could come back.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # how the names of unfinished files and folders begin


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the body a path beside `path` to write a file at, and move that file to `path` when the body ends.

    Missing parent folders are made; the permissions of a file that is replaced, and a link that points to it, are
    kept.  If the body raises, the unfinished file is removed and `path` stays as it was.  One process at a time may
    write the same file.  What is not a regular file (/dev/stdout, a named pipe) is handed to the body itself.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        yield path
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{PARTIAL}{path.name}.new")  # the suffix keeps it out of every glob such as *.json
    try:
        yield beside
        if path.exists():
            shutil.copymode(path, beside)
        flush(beside)
        os.replace(beside, path)
        flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as beside:
        beside.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; line ends stay as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content: object, *, indent: int = 2, ensure_ascii: bool = False) -> None:
    """Write a JSON file that ends in a newline, whole or not at all."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n")


def read_json(path: str | Path) -> object:
    """The content of a JSON file; None if there is no such file, or it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give the body a new folder beside `path` to fill, and move it to `path` when the body ends.

    If the body raises, the unfinished folder is removed and `path` stays as it was.  What an earlier kill has left of
    the same folder is deleted first, so one process at a time may write it.
    """
    path = Path(os.path.abspath(path))
    beside = path.with_name(f"{PARTIAL}{path.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        move_folder(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def adding_to_folder(directory: str | Path, *, last: str) -> Iterator[Path]:
    """Give the body a new folder to fill, and move each of its files into `directory` when the body ends.

    Files of the same names are replaced, and all others are kept; the file `last` is moved when the others are there.
    If the body raises, nothing is moved.  One process at a time may add to a folder.
    """
    directory = Path(directory)
    beside = directory / f"{PARTIAL}new"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        paths = [path for path in beside.rglob("*") if path.is_file()]
        names = sorted((path.relative_to(beside) for path in paths), key=lambda name: (str(name) == last, name))
        for name in names:
            flush(beside / name)
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, directory / name)
        flush(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def move_folder(source: Path, target: Path) -> None:
    """Flush the folder `source` and rename it to `target`, in place of a folder that is already there."""
    for path in (*source.rglob("*"), source):
        flush(path)
    former = target.with_name(f"{PARTIAL}replaced-{target.name}")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        os.replace(target, former)  # a rename onto a folder fails unless that folder is empty
    os.replace(source, target)
    flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def delete_partial(folder: str | Path) -> None:
    """Delete the unfinished files and folders that a kill has left directly in `folder`."""
    for leftover in Path(folder).glob(f"{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content in hexadecimal."""
    return _hexdigest(path, hashlib.sha256())


def xxh3_128(path: str | Path) -> str:
    """The XXH3 of a file's content (128 bits) in hexadecimal: fast, but no protection against changes on purpose."""
    import xxhash  # the ground floor imports the standard library alone

    return _hexdigest(path, xxhash.xxh3_128())


def _hexdigest(path: str | Path, digest: Any) -> str:
    """The digest of a file that is read in blocks of 1 MiB."""
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())
