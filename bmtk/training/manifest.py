"""Folders that are whole: written beside their final place, listed with sizes and hashes, flushed, and then renamed.

A kill at any moment leaves either the whole folder or none with its final name; the manifest shows, file by file, what
the disk has damaged later.
"""

import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bmtk.errors import ROOM, is_disk_full
from bmtk.files import replacing_folder, sha256, xxh3_128

MANIFEST = "manifest.json"
# What a manifest may have of a file.  The first is written: it finds what a disk has damaged as surely as the second,
# which former versions wrote, and reads several times as fast.
HASHES = {"xxh3_128": xxh3_128, "sha256": sha256}


def damages(folder: Path, *, contents: bool = True, rank: int = 0, world_size: int = 1) -> list[str]:
    """Say what is wrong with a folder, file by file; an empty list means that it is whole.

    contents: read every file; else only its size is looked at, which is quick for files of any size.
    Of several processes, each looks at its part of the files.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        share = list(listed.items())[rank::world_size]
        return [problem for name, facts in share for problem in _damage(folder / name, name, facts, contents)]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]


def _damage(path: Path, name: str, facts: dict[str, object], contents: bool) -> Iterator[str]:
    if not path.is_file():
        yield f"{name} is missing"
    elif path.stat().st_size != facts["bytes"]:
        yield f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
    elif contents:
        kind = "sha256" if "sha256" in facts else "xxh3_128"
        if HASHES[kind](path) != facts[kind]:
            yield f"{name} has another {kind} than when it was written"


def facts_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    """What a manifest says of files: name -> size and hash."""
    kind, digest = next(iter(HASHES.items()))
    return {name: {"bytes": (folder / name).stat().st_size, kind: digest(folder / name)} for name in names}


@contextmanager
def written_whole(
    final: Path, *, num_bytes: int, listed: dict[str, dict[str, object]] | None = None
) -> Iterator[Path]:
    """Give the body a folder beside `final` to fill; afterwards list, flush and rename it.

    num_bytes: about how much will be written; where less is free, nothing is begun.  A folder that is already at
    `final` is replaced.  Only one process may call this; what others have written meanwhile, and listed, is in
    `listed`.

    Raises: OSError if something cannot be written; whatever the error, no trace of the folder is left then.
    """
    try:
        if num_bytes > free_bytes(final):
            raise OSError(errno.ENOSPC, "not begun, as it would not fit")
        with replacing_folder(final) as beside:
            yield beside
            listed = dict(listed or {})
            listed |= facts_of(beside, (name for name in files(beside) if name not in listed))
            dump_json(beside / MANIFEST, {"files": dict(sorted(listed.items()))})
    except Exception as error:  # Rust's libraries have classes of their own for what the system reports
        if not (isinstance(error, OSError | SafetensorError) or is_disk_full(error)):
            raise
        raise OSError(
            f"{final} could not be written: {error}. It needs about {num_bytes / 1e6:.1f} MB, and "
            f"{free_bytes(final) / 1e6:.1f} MB are free. Older checkpoints are whole: {ROOM}, then run the same "
            "command again to resume from the newest one"
        ) from error


def files(folder: Path) -> list[str]:
    """Names of all files below `folder`, relative to it, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def dump_json(path: Path, content: Mapping[str, object]) -> None:
    """Write indented JSON straight into a folder that is flushed and renamed as a whole."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def free_bytes(path: Path) -> float:
    """What may still be written where `path` is, or will be; infinite where the file system does not say it."""
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return usage.free if usage.total else math.inf
