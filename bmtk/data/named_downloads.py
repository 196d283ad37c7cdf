"""Fetch a data set of the README by its name: download, check, convert, check again, and only then put it there."""

import difflib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from bmtk.errors import UserError
from bmtk.files import replacing_folder, sha256, write_text

from .content_hashes import content_hash
from .conversions import Places
from .downloads import fetched
from .named_data import DATA, NamedData, Upstream

Log = Callable[[str], None]


def named(name: str) -> NamedData:
    """Raises: UserError for a name that is not listed."""
    found = next((data for data in DATA if data.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [data.name for data in DATA], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{name!r} is no data set of the list{hint} `bmtk data list` shows them")
    return found


def listing(folder: Path) -> Iterator[str]:
    """A line for each data set; whether it is there is judged by the names of its files."""
    rows = [("name", "task", "MB", "licence", "here")]
    for data in DATA:
        there = sum((folder / data.name / file).exists() for file in data.content)
        here = "yes" if there == len(data.content) else "in part" if there else "no"
        rows.append((data.name, data.task, f"{data.megabytes:.1f}", data.licence, here))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if place == 2 else f"{cell:{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    yield f"\nhere: in {folder}/NAME. `bmtk data list NAME` shows sources and files, `bmtk data get NAME` fetches it."


def details(data: NamedData, folder: Path) -> Iterator[str]:
    """What the data set is, where it comes from, and what has to be where."""
    yield f"{data.name}: {data.task}, {data.megabytes:.1f} MB, licence: {data.licence}"
    yield f"{folder / data.name} holds {data.layout}"
    yield from (f"  {file:20} sha256 of its content {digest}" for file, digest in data.content.items())
    yield "made of"
    for source in data.sources:
        known = [f"{source.size:,} bytes"] if source.size else []
        known.append(f"sha256 {source.sha256}" if source.sha256 else "unverified; what is made of it is compared")
        yield f"  {source.url}\n      {', '.join(known)}"
    yield from _by_hand(data, folder)


def _by_hand(data: NamedData, folder: Path) -> Iterator[str]:
    if data.convert is None:
        yield f"There is no conversion for it: put the files above into {folder / data.name} by hand."
        yield f"`bmtk data get {data.name}` then compares their rows with those of the results."
        return
    names = ", ".join(source.name for source in data.sources)
    yield f"Without a network: put {names} into a folder DIR, then `bmtk data get {data.name} --from DIR`."


def get(data: NamedData, folder: Path, *, places: Path, given: Path | None = None, mirror: str = "", log: Log) -> None:
    """Put the data set into `folder`, unless it is there; nothing is put there that differs from what was measured on.

    `places` is the folder with the places of rows, `given` one with the published files; `mirror` replaces the
    scheme and host of URLs.
    Raises: UserError that names the file, for one that cannot be had, or is another one than it should be.
    """
    target = folder / data.name
    if target.exists():
        if problems := _differing(data, target):
            raise UserError(f"{target} is there, but {'; '.join(problems)}; move it away, and get it again")
        log(f"{target} is there already, with the rows that the results were measured on")
        return
    if data.convert is None:
        raise UserError("\n".join([f"{data.name} cannot be fetched", *details(data, folder)]))
    files = [
        _given(source, given) if given else _fetched(source, data, folder, mirror, log) for source in data.sources
    ]
    for source, path in zip(data.sources, files, strict=True):
        _check(source, path, is_ours=given is None)
    with replacing_folder(target) as beside:
        log(f"converting {len(files)} file{'s' * (len(files) > 1)} ...")
        try:
            data.convert(files, beside, _places(data, places))
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(f"{data.name}: the published files are not as they were: {error!r}") from error
        write_text(beside / "README.md", "\n\n".join([f"# {data.name}", *details(data, folder)]) + "\n")
        if problems := _differing(data, beside):
            raise UserError(f"{data.name}: {'; '.join(problems)}; nothing was written to {target}")
    log(f"{target}: {data.layout}; the same rows as those of the results")


def _fetched(source: Upstream, data: NamedData, folder: Path, mirror: str, log: Log) -> Path:
    parts = urlsplit(source.url)
    url = f"{mirror.rstrip('/')}{parts.path}" if mirror else source.url
    log(f"{url}{f', {source.size / 1e6:,.1f} MB' if source.size else ''}")
    try:
        return fetched(url)
    except UserError as error:
        raise UserError("\n".join([str(error), *_by_hand(data, folder), *_addresses(data)])) from error


def _addresses(data: NamedData) -> list[str]:
    return [f"  {source.url}" for source in data.sources]


def _given(source: Upstream, folder: Path) -> Path:
    path = folder / unquote(source.name)
    if not path.is_file():
        raise UserError(f"{path} is not there; get it from {source.url}")
    return path


def _check(source: Upstream, path: Path, *, is_ours: bool) -> None:
    """Raise UserError for a file of another size or hash; a copy in the cache is deleted with what is known of it."""
    size, digest = path.stat().st_size, sha256(path)
    if source.size in (None, size) and source.sha256 in (None, digest):
        return
    if is_ours:
        shutil.rmtree(path.parent, ignore_errors=True)
    raise UserError(
        f"{source.url} is another file than it was: it has {size:,} bytes and sha256 {digest}, not {source.size:,} "
        f"and {source.sha256}"
    )


def _places(data: NamedData, folder: Path) -> Places:
    if not data.has_places:
        return {}
    with np.load(folder / f"{data.name}.npz") as stored:
        return {split: stored[split].astype(np.int64) for split in stored.files}


def _differing(data: NamedData, folder: Path) -> list[str]:
    """What is not as in the list, in words."""
    found = []
    for file, wanted in data.content.items():
        if not (folder / file).exists():
            found.append(f"{file} is missing")
        elif content_hash(folder / file) != wanted:
            found.append(f"{file} holds other rows than the results were measured on")
    return found
