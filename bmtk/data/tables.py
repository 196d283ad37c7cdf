"""Rows with columns: CSV, JSON-lines and Parquet files, folders of them or of images or recordings, Hub data sets.

For data sets of examples (a text and its label); corpora of documents are read by `sources`.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from bmtk.errors import UserError

from .media import MEDIA_SUFFIXES, has_media, media_files, media_rows, undecoded
from .sources import SPLIT_NAMES

SPLITS = tuple(SPLIT_NAMES)
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of `datasets`
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, *BUILDERS)


def read_splits(
    dataset: str | None, *, files: Mapping[str, Sequence[str] | None], splits: Sequence[str] = SPLITS
) -> dict[str, datasets.Dataset]:
    """Those of `splits` that `dataset` has; where `files` names files for a split, these instead.

    `dataset` is a folder (files or sub-folders named after the splits), a single file (all of it is the first of
    `splits`), or a Hub id `owner/name`, with `:config` after it if need be.
    Raises: FileNotFoundError for a path that is not there; UserError for everything else that cannot be read.
    """
    found = {}
    if dataset is not None and any(not files.get(split) for split in splits):
        found = _local_splits(dataset, splits) if _is_local(dataset) else _hub_splits(dataset)
    for split in splits:
        if names := files.get(split):
            found[split] = read_table([Path(name).expanduser() for name in names])
    if not any(split in found for split in splits):
        raise UserError(f"there are no {' or '.join(splits)} rows; name a file with {splits[0]}_file")
    return {split: found[split] for split in splits if split in found}


def read_all(source: str, *, option: str) -> datasets.Dataset:
    """Every row of a table file, a folder of them, an image or recording, or a folder of these; splits play no role.

    Raises: FileNotFoundError if there is no such path (`option` named it), UserError if it cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{option}={str(path)!r} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    if path.is_file() and path.suffix.lower() in MEDIA_SUFFIXES:
        return media_rows(path.parent, [path])
    if path.is_dir() and has_media(path):
        return media_rows(path, media_files(path))
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files:
        raise UserError(f"{option}={str(path)!r} holds no table ({', '.join(SUFFIXES)}), image or recording")
    return read_table(files)


def read_table(paths: Sequence[Path]) -> datasets.Dataset:
    """The rows of one or more files of the same kind, in the order given; images and recordings are not decoded."""
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    names, suffixes = ", ".join(map(str, paths)), sorted({path.suffix for path in paths})
    if len(suffixes) > 1 or suffixes[0] not in SUFFIXES:
        raise UserError(
            f"{names}: cannot read files that end in {', '.join(suffixes)}; "
            f"give files of one kind among {', '.join(SUFFIXES)}"
        )
    if any(path.stat().st_size == 0 for path in paths):
        raise UserError(f"{names}: an empty file has no rows")
    if suffixes[0] in DELIMITERS:
        return datasets.concatenate_datasets([_read_csv(path, DELIMITERS[path.suffix]) for path in paths])
    return undecoded(_load(BUILDERS[suffixes[0]], where=names, data_files=[str(path) for path in paths])["train"])


def _read_csv(path: Path, delimiter: str) -> datasets.Dataset:
    """All cells as text: pandas would make numbers and gaps of some, and shift columns where a line is too long."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            columns, *rows = (line for line in lines if line)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table in UTF-8 with a header line ({error})") from error
    if not rows:
        raise UserError(f"{path} has no rows, only the columns {', '.join(columns)}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(columns):
            raise UserError(
                f"{path}, row {number}: {len(row)} cells where the header has {len(columns)} "
                f"({', '.join(columns)}); put a text that holds a {delimiter!r} in double quotes"
            )
    return datasets.Dataset.from_dict(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True)))


def one_table(dataset: str | None) -> list[Path]:
    """The table of a data set that is a single file, or a folder with one table named after no split; else nothing."""
    path = Path(dataset or "").expanduser()
    if dataset and path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()]
        named = [file for file in files if any(_belongs(file.relative_to(path), split) for split in SPLITS)]
        return files if len(files) == 1 and not named else []
    return [path] if dataset and path.is_file() and path.suffix in SUFFIXES else []


def check_column(rows: datasets.Dataset, column: str, *, option: str, where: str) -> None:
    """Raise UserError, listing the columns there are, if `column` (which `option` asked for) is not in `rows`."""
    if column not in rows.column_names:
        raise UserError(
            f"{option}={column!r} is not in the {where} data; its columns are {', '.join(rows.column_names)}"
        )


def _is_local(dataset: str) -> bool:
    looks_like_a_path = (
        dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or Path(dataset).suffix in SUFFIXES
    )
    return looks_like_a_path or Path(dataset).exists()


def _local_splits(dataset: str, splits: Sequence[str]) -> dict[str, datasets.Dataset]:
    path = Path(dataset).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"dataset={str(path)!r} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    if path.is_file():
        return {splits[0]: read_table([path])}
    if has_media(path):
        return _media_splits(path, splits)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    found = {split: [file for file in files if _belongs(file.relative_to(path), split)] for split in SPLIT_NAMES}
    if not any(found.values()):
        there = ", ".join(str(file.relative_to(path)) for file in files[:8]) or "none of these kinds"
        raise UserError(
            f"dataset={str(path)!r} holds no file named after train, validation or test ({', '.join(SUFFIXES)}); "
            f"there is: {there}; name the files with train_file and validation_file"
        )
    return {split: read_table(names) for split, names in found.items() if names and split in splits}


def _media_splits(path: Path, splits: Sequence[str]) -> dict[str, datasets.Dataset]:
    """Rows of `path/train/...`, `path/test/...`; a folder without such parts is all of the first of `splits`."""
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    parts = {split: [f for f in folders if f.name in names] for split, names in SPLIT_NAMES.items() if split in splits}
    if not any(parts.values()):
        return {splits[0]: media_rows(path, media_files(path))}
    return {split: media_rows(found[0], media_files(found[0])) for split, found in parts.items() if found}


def _belongs(path: Path, split: str) -> bool:
    """Whether the first word of the file's name, or the first folder on the way to it, names the split."""
    word = path.name.replace("-", ".").replace("_", ".").split(".")[0]
    return word in SPLIT_NAMES[split] or (len(path.parts) > 1 and path.parts[0] in SPLIT_NAMES[split])


def _hub_splits(dataset: str) -> dict[str, datasets.Dataset]:
    name, _, config = dataset.partition(":")
    loaded = _load(
        name, *([config] if config else []), where=f"dataset={dataset!r} (no folder or file here, so a Hub id)"
    )
    names = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
    return {names[name]: undecoded(rows) for name, rows in loaded.items() if name in names}


def _load(*args: str, where: str, **options: Any) -> datasets.DatasetDict:
    shows_progress = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        if "corresponds to no data" in str(reason):
            raise UserError(f"{where} has no rows") from error
        raise UserError(f"{where} cannot be read: {type(reason).__name__}: {reason}") from error
    finally:
        if shows_progress:
            datasets.enable_progress_bars()


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    there = sorted(file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES)
    return f"; {path.parent} holds {', '.join(there[:8])}" if there else ""
