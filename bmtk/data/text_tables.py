"""Rows of CSV, TSV and JSON files and of tar archives as tables, with notes of what was found in them.

A large table is read as a stream and kept in the cache of `datasets`, by the content of what it was read from (of
archives and Parquet, by size and time).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from bmtk.errors import UserError
from bmtk.files import sha256

from .archives import archive_rows
from .delimited import delimited_rows, found_dialect
from .json_rows import json_rows
from .media import KIND_OF_SUFFIX
from .printed import printed_kinds, printed_values
from .row_batches import Batches, Columns, SizedRow, batched, kept_file, kept_table, table_of
from .text_files import TableFormat, Unreadable, is_compressed, suffix_of

SHOWN = 60  # characters of a cell in notes
LAYOUT = 1  # of kept tables: another number makes all of them anew
LINE = -1  # the line that a row begins on, beside its cells


def read_delimited(path: Path, layout: TableFormat, notes: list[str]) -> datasets.Dataset:
    """All cells as text: pandas would make numbers and gaps of some, and shift columns where a line is too long."""
    kind = f"a table in {layout.encoding or 'UTF-8'} with a header line"
    try:
        return kept_or_read([path], layout, notes, partial(_delimited_table, path, layout))
    except Unreadable as error:
        raise UserError(error.sentence(path, kind)) from error


def read_json(paths: Sequence[Path], layout: TableFormat, notes: list[str]) -> datasets.Dataset:
    """Columns are those of all rows; a value that a row lacks is missing."""

    def rows() -> Iterator[SizedRow]:
        for path in paths:
            try:
                for where, row in json_rows(path, layout):
                    yield _num_bytes(row, path, where), row
            except Unreadable as error:
                raise UserError(f"{path} cannot be read: {error}") from error

    def read(found: list[str], kept_at: Callable[[], Path]) -> datasets.Dataset:
        table = table_of(Batches(lambda: batched(rows())), where=str(paths[0]), notes=found, kept_at=kept_at)
        if table is None:
            raise UserError(f"{', '.join(map(str, paths))} has no rows")
        return table

    return kept_or_read(paths, layout, notes, read)


def read_archives(paths: Sequence[Path], notes: list[str]) -> datasets.Dataset:
    """Rows of tar archives, which hold the places of their images and recordings."""
    if packed := [path for path in paths if is_compressed(path)]:
        raise UserError(f"{packed[0]} is compressed as a whole, so that no row of it can be found; unpack it to .tar")

    def read(found: list[str], kept_at: Callable[[], Path]) -> datasets.Dataset:
        batches = Batches(lambda: batched((len(repr(row)), row) for row in archive_rows(paths, KIND_OF_SUFFIX)))
        table = table_of(batches, where=str(paths[0]), notes=found, kept_at=kept_at)
        if table is None:
            names = ", ".join(map(str, paths))
            raise UserError(f"{names} has no rows: no image, recording, .cls, .txt or .json, named as WebDataset does")
        return table

    return kept_or_read(paths, None, notes, read)


def kept_or_read(
    paths: Sequence[Path],
    layout: TableFormat | None,
    notes: list[str],
    read: Callable[[list[str], Callable[[], Path]], datasets.Dataset],
) -> datasets.Dataset:
    """The table of some files as it was kept when they were read before, or what `read` makes of them.

    `read` gets a list for its notes, and where to keep a large table.
    """
    found: list[str] = []
    path = kept_file(_mark(paths, layout))
    table = kept_table(path, found) or read(found, lambda: path)
    notes += found
    return table


def _mark(paths: Sequence[Path], layout: TableFormat | None) -> str:
    """What differs where the files do; archives and Parquet, which may be large, are known by size and time."""
    facts: list[object] = [LAYOUT, None if layout is None else [layout.delimiter, layout.encoding]]
    for path in paths:
        about = path.stat()
        content = sha256(path) if layout is not None else [about.st_size, about.st_mtime_ns]
        facts.append([str(path.absolute()), content])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ CSV and TSV


def _delimited_table(
    path: Path, layout: TableFormat, notes: list[str], kept_at: Callable[[], Path]
) -> datasets.Dataset:
    columns, dialect = next(delimited_rows(path, layout))[1], found_dialect(path, layout)
    batches, survey = Batches(lambda: batched(_cells(path, layout))), _Survey(path, columns)
    for batch in batches:
        survey.add(batch.columns)
    if suffix_of(path) == ".csv" and dialect.delimiter != "," and not layout.delimiter:
        notes.append(f"{path}: cells are divided by {dialect.delimiter!r}")
    if dialect.is_unquoted:
        notes.append(f"{path}: quotes around cells are taken off, as every quote of the file is written as in CSV")
    notes += survey.notes(counts_odd=not dialect.is_unquoted)
    survey.check_names()
    table = table_of(batches.changed(survey.values), where=str(path), notes=notes, kept_at=kept_at)
    if table is None:
        raise UserError(f"{path} has no rows, only the columns {', '.join(columns)}")
    return table


def _cells(path: Path, layout: TableFormat) -> Iterator[SizedRow]:
    """Each row with its line and its cells by their places: names may be missing, and then are the same."""
    rows = delimited_rows(path, layout)
    next(rows)
    for line, cells in rows:
        yield sum(map(len, cells)), {LINE: line, **dict(enumerate(cells))}


class _Survey:
    """What is found in the cells of a file, some rows at a time."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns
        self.is_tsv = suffix_of(path) == ".tsv"
        self.filled: set[int] = set()  # places of columns with a cell that is not blank
        self.printed: dict[int, set[str]] = {place: set() for place in range(len(columns))}  # where all cells are
        self.num_odd, self.first_odd = 0, ""

    def add(self, columns: Columns) -> None:
        for place in range(len(self.columns)):
            cells = columns[place]
            if place not in self.filled and any(map(str.strip, cells)):
                self.filled.add(place)
            if place in self.printed:
                kinds = printed_kinds(cells)
                if kinds is None:
                    del self.printed[place]
                else:
                    self.printed[place] |= kinds
        self._count_odd(columns)

    def _count_odd(self, columns: Columns) -> None:
        """Cells with a line break, which an open quote makes of several rows, and quotes that are kept."""
        odd = [
            (row, place, cell)
            for place in range(len(self.columns))
            for row, cell in enumerate(columns[place])
            if (len(cell) > 1 and cell[0] == cell[-1] == '"' if self.is_tsv else "\n" in cell or "\r" in cell)
        ]
        if odd and not self.num_odd:
            row, _, cell = min(odd)
            self.first_odd = f"the first in line {columns[LINE][row]}: {cell[:SHOWN]!r}"
        self.num_odd += len(odd)

    @property
    def kept(self) -> list[int]:
        """Places of the columns that have a name or a cell."""
        return [place for place, name in enumerate(self.columns) if name or place in self.filled]

    @property
    def values_of(self) -> list[int]:
        """Places of the columns that hold printed values of one kind."""
        return [place for place in self.kept if len(self.printed.get(place, ())) == 1]

    def check_names(self) -> None:
        nameless = [place + 1 for place in self.kept if not self.columns[place]]
        if len(nameless) > 1:
            where = ", ".join(map(str, nameless))
            raise UserError(f"{self.path}: columns {where} have cells and no name; name them")

    def notes(self, *, counts_odd: bool) -> list[str]:
        found = []
        if self.num_odd and counts_odd:
            what = "have a line break within quotes: see that no quote was left open"
            if self.is_tsv:
                what = "begin and end with a double quote, which is kept "
                what += "(if it is not part of them, rename the file to .csv)"
            found.append(f"{self.path}: {self.num_odd:,} cells {what}; {self.first_odd}")
        if names := ", ".join(repr(self.columns[place]) for place in self.values_of):
            found.append(
                f"{self.path}: {names} hold values that were printed as text, such as lists: they are read as values"
            )
        return found

    def values(self, columns: Columns) -> Columns:
        """Cells, and what was printed into them, by the names of their columns."""
        found: Columns = {self.columns[place]: columns[place] for place in self.kept}
        for place in self.values_of:
            cells = columns[place]
            found[self.columns[place]] = printed_values(cells) or [None] * len(cells)
        return found


# ------------------------------------------------------------------------------------------------ JSON


def _num_bytes(row: Mapping[str, Any], path: Path, where: str) -> int:
    """Of the texts of a row.  Raises: UserError for halves of characters, which JSON can write and UTF-8 cannot."""
    values = (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in row.values())
    try:
        return sum(len(value.encode()) for value in values)
    except UnicodeEncodeError as error:
        raise UserError(f"{path}, {where}: the text is not Unicode ({error}); repair or remove it") from error
