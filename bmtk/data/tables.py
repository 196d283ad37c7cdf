"""Rows with columns: CSV, JSON-lines and Parquet files, folders of them or of images or recordings, Hub data sets.

For data sets of examples (a text and its label); corpora of documents are read by `sources`.
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from bmtk.errors import UserError

from .folders import Listing, list_folder
from .media import majority_kind, media_kind, media_rows, metadata_files, undecoded
from .sources import SPLIT_NAMES

logger = logging.getLogger(__name__)

SPLITS = tuple(SPLIT_NAMES)
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # of `datasets`
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, *BUILDERS)


def read_splits(
    dataset: str | None,
    *,
    files: Mapping[str, Sequence[str] | None],
    splits: Sequence[str] = SPLITS,
    notes: list[str] | None = None,
) -> dict[str, datasets.Dataset]:
    """Those of `splits` that `dataset` has; where `files` names files for a split, these instead.

    `dataset` is a folder (files or sub-folders named after the splits), a single file (all of it is the first of
    `splits`), or a Hub id `owner/name`, with `:config` after it if need be.  `notes` gets what was left out.
    Raises: FileNotFoundError for a path that is not there; UserError for everything else that cannot be read.
    """
    found = {}
    if dataset is not None and any(not files.get(split) for split in splits):
        found = _local_splits(dataset, splits, notes) if _is_local(dataset) else _hub_splits(dataset)
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
    if path.is_file():
        return media_rows(path.parent, [path]) if media_kind(path) else read_table([path])
    listing = list_folder(path)
    kind = _folder_kind(listing)
    files = _files_of_kind(listing, kind)
    for note in _notes_of(listing, kind, files):
        logger.warning("note: %s", note)
    if not files:
        raise UserError(f"{option}={str(path)!r} holds no table ({', '.join(SUFFIXES)}), image or recording")
    return read_table(files) if kind == "table" else media_rows(path, files)


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
        listing = list_folder(path)
        files = _files_of_kind(listing, "table") if _folder_kind(listing) == "table" else []
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


def _local_splits(dataset: str, splits: Sequence[str], notes: list[str] | None) -> dict[str, datasets.Dataset]:
    path = Path(dataset).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"dataset={str(path)!r} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    if path.is_file():
        return {splits[0]: read_table([path])}
    listing, kept = list_folder(path), notes if notes is not None else []
    kind = _folder_kind(listing)
    files = _files_of_kind(listing, kind)
    kept += _notes_of(listing, kind, files)
    if kind != "table":
        return _media_splits(path, files, splits, kept)
    found = {split: [file for file in files if _belongs(file.relative_to(path), split)] for split in SPLIT_NAMES}
    if not any(found.values()):
        there = ", ".join(str(file.relative_to(path)) for file in files[:8]) or "none of these kinds"
        raise UserError(
            f"dataset={str(path)!r} holds no file named after train, validation or test ({', '.join(SUFFIXES)}); "
            f"there is: {there}; name the files with train_file and validation_file"
        )
    named = {file for names in found.values() for file in names}
    if unnamed := [file.name for file in files if file not in named]:
        kept.append(
            f"{path}: {len(unnamed):,} tables are named after no split, and not read: {', '.join(unnamed[:4])}"
        )
    return {split: read_table(names) for split, names in found.items() if names and split in splits}


def _media_splits(
    path: Path, files: Sequence[Path], splits: Sequence[str], notes: list[str]
) -> dict[str, datasets.Dataset]:
    """Rows of `path/train/...`, `path/test/...`; a folder without such parts is all of the first of `splits`."""
    tops = {file.relative_to(path).parts[0] for file in files}
    parts = {split: next((name for name in sorted(tops) if name in SPLIT_NAMES[split]), None) for split in SPLIT_NAMES}
    if not any(parts.values()):
        return {splits[0]: media_rows(path, files)}
    found = {
        split: (path / name, [file for file in files if path / name in file.parents])
        for split, name in parts.items()
        if name
    }
    outside = len(files) - sum(len(names) for _, names in found.values())
    if outside:
        notes.append(f"{path}: {outside:,} files lie in no folder that is named after a split, and are not read")
    return {split: media_rows(*part) for split, part in found.items() if split in splits}


def _is_table(path: Path) -> bool:
    return path.suffix in SUFFIXES


def _files_of_kind(listing: Listing, kind: str) -> list[Path]:
    """The tables of a folder, or its files of one kind of media."""
    return [path for path in listing.files if (_is_table(path) if kind == "table" else media_kind(path) == kind)]


def _notes_of(listing: Listing, kind: str, files: Sequence[Path]) -> list[str]:
    """What of a folder is hidden, and what else is not read."""
    about_media = metadata_files(listing.folder) if kind != "table" else []
    name = {"table": "tables", "image": "images", "audio": "recordings"}[kind]
    return [note for note in (listing.hidden_note, listing.left_out_note([*files, *about_media], name)) if note]


def _folder_kind(listing: Listing) -> str:
    """What most examples of a folder are: image, audio, or rows of tables ("table").

    An example is a file, or a row.  Tables that are named after no split are metadata of images that lie in folders.
    """
    path, tables = listing.folder, _files_of_kind(listing, "table")
    kind = majority_kind(listing.files, path)
    if not kind or not tables:
        return kind or "table"
    media = _files_of_kind(listing, kind)
    about_media = set(metadata_files(path))
    tables = [table for table in tables if table not in about_media]
    are_named = any(_belongs(table.relative_to(path), split) for table in tables for split in SPLITS)
    if not are_named and len({file.parent for file in media}) > 1:
        return kind
    return "table" if _num_rows_reach(tables, len(media) + 1) else kind


def _num_rows_reach(tables: Sequence[Path], count: int) -> bool:
    """Whether tables have `count` rows together; of texts their lines are counted, and no more than needed."""
    for table in tables:
        if table.suffix == ".parquet":
            count -= pyarrow.parquet.read_metadata(table).num_rows
            continue
        with table.open("rb") as file:
            count += table.suffix in DELIMITERS  # the header
            while count > 0 and (part := file.read(1 << 20)):
                count -= part.count(b"\n")
        if count <= 0:
            return True
    return count <= 0


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
