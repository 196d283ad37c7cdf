"""Folders that are whole: written beside their final place, listed with sizes and sha256, flushed, and then renamed.

A kill at any moment leaves either the whole folder or none with its final name; the manifest shows, file by file, what
the disk has damaged later.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"
PARTIAL = ".partial-"  # start of the names of folders that are being written or deleted


def damages(folder: Path) -> list[str]:
    """Say what is wrong with a folder, file by file; an empty list means that it is whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return [problem for name, facts in listed.items() for problem in _damage(folder / name, name, **facts)]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]


def _damage(path: Path, name: str, *, bytes: int, sha256: str) -> Iterator[str]:
    if not path.is_file():
        yield f"{name} is missing"
    elif path.stat().st_size != bytes:
        yield f"{name} has {path.stat().st_size} bytes instead of {bytes}"
    elif _sha256(path) != sha256:
        yield f"{name} has another sha256 than when it was written"


@contextmanager
def written_whole(final: Path, *, num_bytes: int) -> Iterator[Path]:
    """Give the body a folder beside `final` to fill; afterwards list, flush and rename it.

    num_bytes: about how much will be written, for an error when it does not fit.  A folder that is already at `final`
    is replaced.  Leftovers of earlier kills in the same place are deleted, so only one process may write there.

    Raises: OSError if something cannot be written; whatever the error, no trace of the folder is left then.
    """
    beside = final.with_name(f"{PARTIAL}{final.name}")
    try:
        delete_partial(final.parent)
        beside.mkdir(parents=True)
        yield beside
        listed = {
            name: {"bytes": (beside / name).stat().st_size, "sha256": _sha256(beside / name)} for name in files(beside)
        }
        write_json(beside / MANIFEST, {"files": listed})
        for path in (*beside.rglob("*"), beside):
            flush(path)
        if final.exists():
            os.replace(final, final.with_name(f"{PARTIAL}replaced-{final.name}"))
        os.replace(beside, final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{final} could not be written: {error}. It needs about {num_bytes / 1e6:.1f} MB, and "
            f"{_free_bytes(final) / 1e6:.1f} MB are free. Older checkpoints are whole: make room, then run the same "
            "command again to resume from the newest one"
        ) from error
    finally:
        delete_partial(final.parent)


def delete_partial(directory: Path) -> None:
    """Delete what a kill has left half-written or half-deleted in `directory`."""
    for leftover in directory.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flush(path: Path) -> None:
    """Have a file or folder written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
