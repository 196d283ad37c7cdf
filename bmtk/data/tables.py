"""Rows with columns: CSV, JSON and Parquet files, folders of them or of images or recordings, Hub data sets.

For data sets of examples (a text and its label); corpora of documents are read by `sources`.  What is written is what
is read: in CSV every cell is a text, in JSON a string stays a string and whole numbers keep their digits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from bmtk.errors import UserError

from . import archives
from .columns import first_missing, rows_at_once
from .delimited import SUFFIXES as DELIMITED
from .folders import Listing, list_folder
from .json_rows import SUFFIXES as JSON
from .media import majority_kind, media_kind, media_rows, metadata_files, undecoded
from .parquet_tables import read_parquet
from .patterns import is_pattern, matching_files
from .printed import looks_printed
from .row_batches import ROWS_AT_ONCE
from .sources import SPLIT_NAMES
from .text_files import TableFormat, suffix_of
from .text_tables import read_archives, read_delimited, read_json

SPLITS = tuple(SPLIT_NAMES)
SUFFIXES = (*DELIMITED, *JSON, ".parquet", archives.SUFFIX)
AS_FOUND = TableFormat()
SHOWN = 60  # characters of a cell in notes


def read_splits(
    dataset: str | None,
    *,
    files: Mapping[str, Sequence[str] | None],
    splits: Sequence[str] = SPLITS,
    layout: TableFormat = AS_FOUND,
    notes: list[str] | None = None,
) -> dict[str, datasets.Dataset]:
    """Those of `splits` that `dataset` has; where `files` names files for a split, these instead.

    `dataset` is a folder (files or sub-folders named after the splits), a single file (all of it is the first of
    `splits`), or a Hub id `owner/name`, with `:config` after it if need be.  `notes` are added to.
    Raises: FileNotFoundError for a path that is not there; UserError for everything else that cannot be read.
    """
    notes, found = [] if notes is None else notes, {}
    if dataset is not None and any(not files.get(split) for split in splits):
        wanted = [split for split in splits if not files.get(split)]
        found = _local_splits(dataset, splits, wanted, layout, notes) if _is_local(dataset) else _hub_splits(dataset)
    for split in splits:
        if names := files.get(split):
            found[split] = read_table(named_files(names, f"{split}_file"), layout, notes)
    if not any(split in found for split in splits):
        raise UserError(f"there are no {' or '.join(splits)} rows; name a file with {splits[0]}_file")
    return {split: found[split] for split in splits if split in found}


def read_all(
    source: str, *, option: str, layout: TableFormat = AS_FOUND, notes: list[str] | None = None
) -> datasets.Dataset:
    """Every row of a table file, a folder of them, an image or recording, or a folder of these; splits play no role.

    Raises: FileNotFoundError if there is no such path (`option` named it), UserError if it cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists() and is_pattern(source):
        return read_table(matching_files(source, SUFFIXES, option=option), layout, notes)
    if not path.exists():
        raise FileNotFoundError(f"{option}={str(path)!r} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    if path.is_file():
        return media_rows(path.parent, [path]) if media_kind(path) else read_table([path], layout, notes)
    listing = list_folder(path)
    kind = _folder_kind(listing)
    files = _files_of_kind(listing, kind)
    if notes is not None:
        notes += _notes_of(listing, kind, files)
    if not files:
        raise UserError(f"{option}={str(path)!r} holds no table ({', '.join(SUFFIXES)}), image or recording")
    return read_table(files, layout, notes) if kind == "table" else media_rows(path, files)


def files_read(source: str) -> list[Path]:
    """The files that `read_all` reads: tables, or images and recordings and the metadata beside them."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return [path] if path.exists() or not is_pattern(source) else matching_files(source, SUFFIXES, option="input")
    listing = list_folder(path)
    kind = _folder_kind(listing)
    return [*_files_of_kind(listing, kind), *(metadata_files(path) if kind != "table" else ())]


def named_files(names: Sequence[str], option: str) -> list[Path]:
    """The files that names and patterns of names stand for, in the order given."""
    return [path for name in names for path in matching_files(name, SUFFIXES, option=option)]


def is_table(path: Path) -> bool:
    """Whether a name is that of a table, compressed or not, in letters of either case."""
    return suffix_of(path) in SUFFIXES


def read_table(
    paths: Sequence[Path], layout: TableFormat = AS_FOUND, notes: list[str] | None = None
) -> datasets.Dataset:
    """The rows of one or more files of the same kind, in the order given; images and recordings are not decoded.

    `notes` are added to: what was found in the files, and what was made of it.
    """
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"data file {path} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    names, suffixes = ", ".join(map(str, paths)), sorted({suffix_of(path) for path in paths})
    if len(suffixes) > 1 or suffixes[0] not in SUFFIXES:
        raise UserError(
            f"{names}: cannot read files that end in {', '.join(suffixes)}; "
            f"give files of one kind among {', '.join(SUFFIXES)}, as they are or compressed (.gz, .bz2, .xz, .zst)"
        )
    if any(path.stat().st_size == 0 for path in paths):
        raise UserError(f"{names}: an empty file has no rows")
    notes = [] if notes is None else notes
    if suffixes[0] == archives.SUFFIX:
        return read_archives(paths, notes)
    if suffixes[0] in DELIMITED:
        return datasets.concatenate_datasets([read_delimited(path, layout, notes) for path in paths])
    return read_json(paths, layout, notes) if suffixes[0] in JSON else read_parquet(paths, notes)


def one_table(dataset: str | None) -> list[Path]:
    """The table of a data set that is a single file, a pattern, or a folder with one table; else nothing.

    Nor is there one where a file of the folder or the pattern is named after a split.
    """
    path = Path(dataset or "").expanduser()
    if dataset and path.is_dir():
        listing = list_folder(path)
        files = _files_of_kind(listing, "table") if _folder_kind(listing) == "table" else []
        named = [file for file in files if any(_belongs(file.relative_to(path), split) for split in SPLITS)]
        return files if len(files) == 1 and not named else []
    if dataset and not path.exists() and is_pattern(dataset):
        files = matching_files(dataset, SUFFIXES, option="dataset")
        return [] if any(_of_splits(files).values()) else files
    return [path] if dataset and path.is_file() and is_table(path) else []


def check_column(rows: datasets.Dataset, column: str, *, option: str, where: str) -> None:
    """Raise UserError, listing the columns there are, if `column` (which `option` asked for) is not in `rows`."""
    if column not in rows.column_names:
        is_quoted = f'"{column}"' in rows.column_names
        hint = "; a file whose cells are quoted is read as such if its name ends in .csv" if is_quoted else ""
        raise UserError(
            f"{option}={column!r} is not in the {where} data; its columns are {', '.join(rows.column_names)}{hint}"
        )


def text_cells(rows: datasets.Dataset, column: str, *, option: str, where: str) -> list[str]:
    """The texts of a column: numbers as their digits, missing ones empty.

    Raises: UserError if there is no such column, or a cell is several texts, a structure or bytes.
    """
    check_column(rows, column, option=option, where=where)
    return [as_text(value, f"{option}={column!r} of {where} row {row}") for row, value in enumerate(rows[column], 1)]


class TextColumn(NamedTuple):
    """A column of texts, and the setting that names it; `value` is the setting's, where that is not the column."""

    column: str
    option: str
    value: str | None = None

    def texts(self, batch: Mapping[str, list[Any]], rows: Sequence[int], where: str) -> list[str]:
        """Its cells of some rows of `where` as texts.  Raises: as `as_text`."""
        place = f"{self.option}={(self.value or self.column)!r} of {where} row"
        return [as_text(cell, f"{place} {row + 1}") for row, cell in zip(rows, batch[self.column], strict=True)]


def text_rows(table: datasets.Dataset, columns: Mapping[str, TextColumn], *, where: str) -> datasets.Dataset:
    """Columns of texts by their new names, as `text_cells` reads them, in memory or in a file as `table` is.

    Texts without gaps stay where they are.
    """
    for column, option, _ in columns.values():
        check_column(table, column, option=option, where=where)
    names = {column: name for name, (column, _, _) in columns.items()}
    if len(names) == len(columns) and all(_is_plain(table, column) for column in names):
        return table.select_columns(list(names)).rename_columns(names)

    def read(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[str]]:
        return {name: column.texts(batch, rows, where) for name, column in columns.items()}

    return changed_rows(table, read, dict.fromkeys(columns, datasets.Value("string")))


def _is_plain(table: datasets.Dataset, column: str) -> bool:
    """Whether a column holds a text in every row."""
    held = table.data.schema.field(column).type
    is_text = pyarrow.types.is_string(held) or pyarrow.types.is_large_string(held)
    return is_text and first_missing(table, column) is None


def changed_rows(
    table: datasets.Dataset,
    change: Callable[[dict[str, list[Any]], list[int]], Mapping[str, list[Any]]],
    kinds: Mapping[str, Any],
) -> datasets.Dataset:
    """What `change` makes of some rows at a time and their numbers, of these kinds; in a file if `table` is in one.

    It is made anew each time, as a file that was kept would not know of changes in what `change` calls.
    """
    features = datasets.Features(dict(kinds))
    return table.map(
        change,
        batched=True,
        batch_size=rows_at_once(table),
        with_indices=True,
        remove_columns=table.column_names,
        features=features,
        load_from_cache_file=False,
    )


def encoded_rows(
    rows: datasets.Dataset,
    encode: Callable[[dict[str, list[Any]]], Mapping[str, list[Any]]],
    *,
    most: int = ROWS_AT_ONCE,
    **options: Any,
) -> datasets.Dataset:
    """`rows` with what `encode` makes of at most `most` of them at a time; made anew each time, as `changed_rows`."""
    size = min(most, rows_at_once(rows))
    return rows.map(encode, batched=True, batch_size=size, load_from_cache_file=False, **options)


def as_text(value: object, where: str) -> str:
    """A cell as one text.  Raises: UserError that names `where` for several texts, a structure or bytes."""
    if isinstance(value, list | tuple):
        raise UserError(
            f"{where} holds a list ({str(value)[:SHOWN]}), and one text is needed: write a row for each of its items, "
            "or join them (a CSV column whose every cell is a printed list is read as lists; in JSON a string stays "
            "a string)"
        )
    if isinstance(value, dict | bytes):
        kind = "bytes that are not UTF-8" if isinstance(value, bytes) else f"{', '.join(map(str, value))} together"
        raise UserError(f"{where} holds {kind} ({str(value)[:SHOWN]}), and one text is needed: give it as a text")
    return "" if value is None else str(value)


def note_printed(texts: Iterable[str], notes: list[str], *, option: str, where: str) -> None:
    """Note texts that look like printed lists, which are read as they are."""
    found = [text for text in texts if looks_printed(text)]
    if found:
        notes.append(f"{option}: {len(found):,} {where} texts look like printed lists, such as {found[0][:SHOWN]!r}")


def _is_local(dataset: str) -> bool:
    looks_like_a_path = dataset.startswith(("/", ".", "~")) or dataset.count("/") > 1 or is_table(Path(dataset))
    return looks_like_a_path or is_pattern(dataset) or Path(dataset).exists()


def _local_splits(
    dataset: str, splits: Sequence[str], wanted: Sequence[str], layout: TableFormat, notes: list[str]
) -> dict[str, datasets.Dataset]:
    """The tables of the `wanted` ones of `splits`."""
    path = Path(dataset).expanduser()
    if not path.exists() and is_pattern(dataset):
        return _pattern_splits(dataset, splits, wanted, layout, notes)
    if not path.exists():
        raise FileNotFoundError(f"dataset={str(path)!r} does not exist (looked in {Path.cwd()}){_neighbours(path)}")
    if path.is_file():
        return {splits[0]: read_table([path], layout, notes)} if splits[0] in wanted else {}
    listing = list_folder(path)
    kind = _folder_kind(listing)
    files = _files_of_kind(listing, kind)
    notes += _notes_of(listing, kind, files)
    if kind != "table":
        return _media_splits(path, files, splits, notes)
    found = {split: [file for file in files if _belongs(file.relative_to(path), split)] for split in SPLIT_NAMES}
    if not any(found.values()):
        there = ", ".join(str(file.relative_to(path)) for file in files[:8]) or "none of these kinds"
        raise UserError(
            f"dataset={str(path)!r} holds no file named after train, validation or test ({', '.join(SUFFIXES)}); "
            f"there is: {there}; name the files with train_file and validation_file"
        )
    named = {file for names in found.values() for file in names}
    if unnamed := [file.name for file in files if file not in named]:
        notes.append(
            f"{path}: {len(unnamed):,} tables are named after no split, and not read: {', '.join(unnamed[:4])}"
        )
    return {split: read_table(names, layout, notes) for split, names in found.items() if names and split in wanted}


def _pattern_splits(
    pattern: str, splits: Sequence[str], wanted: Sequence[str], layout: TableFormat, notes: list[str]
) -> dict[str, datasets.Dataset]:
    """The tables of a pattern by the names of the files; if none is named after a split, all are of the first."""
    files = matching_files(pattern, SUFFIXES, option="dataset")
    found = _of_splits(files)
    if not any(found.values()):
        found = {splits[0]: files}
    elif unnamed := [str(file) for file in files if not any(file in of_split for of_split in found.values())]:
        raise UserError(
            f"dataset={pattern!r} has files that are named after a split and others that are not, such as "
            f"{unnamed[0]}; name them with train_file and validation_file"
        )
    return {split: read_table(names, layout, notes) for split, names in found.items() if names and split in wanted}


def _of_splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by their own names alone."""
    return {split: [file for file in files if _belongs(Path(file.name), split)] for split in SPLITS}


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


def _files_of_kind(listing: Listing, kind: str) -> list[Path]:
    """The tables of a folder, or its files of one kind of media."""
    return [path for path in listing.files if (is_table(path) if kind == "table" else media_kind(path) == kind)]


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
        if suffix_of(table) == archives.SUFFIX:  # made to hold many
            return True
        if suffix_of(table) == ".parquet":
            count -= pyarrow.parquet.read_metadata(table).num_rows
            continue
        with table.open("rb") as file:
            count += suffix_of(table) in DELIMITED  # the header
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
    there = sorted(file.name for file in path.parent.iterdir() if is_table(file))
    return f"; {path.parent} holds {', '.join(there[:8])}" if there else ""
