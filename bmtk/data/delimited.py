"""Rows of CSV and TSV files as lists of texts, streamed: the delimiter is found, and errors name the line.

In .csv cells may be quoted and hold line breaks.  In .tsv a row is a line, and a quote is a character like others,
unless every quote of the file is that of a cell written as in CSV, with doubled ones to prove it.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TextIO

from .text_files import BadRow, TableFormat, Unreadable, opened_text, suffix_of

SUFFIXES = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t", "|")  # that are looked for in .csv
LONGEST_CELL = (1 << 31) - 1  # the largest number that the csv module takes on every system
SNIFFED_CHARACTERS, SNIFFED_ROWS = 1 << 16, 50
QUOTED = re.compile(r'"(?:[^"]|"")*"')
Row = tuple[int, list[str]]  # the line that it begins on, from 1, and its cells


class Dialect(NamedTuple):
    """How a file is written."""

    delimiter: str
    is_announced: bool = False  # in a first line "sep=;", which is no row
    is_unquoted: bool = False  # whether quotes are taken off the cells of a .tsv


def delimited_rows(
    path: Path, layout: TableFormat, *, on_bad: Callable[[BadRow], None] | None = None
) -> Iterator[Row]:
    """The header, then every row that is not blank; all have as many cells as the header.

    A row of another length is left to `on_bad`, if that is given.

    Raises: Unreadable for a row of another length, an open quote, a column that is there twice, or an encoding.
    """
    csv.field_size_limit(LONGEST_CELL)  # of the whole process; the default refuses texts of more than 128 KiB
    marks = on_bad is not None
    dialect = found_dialect(path, layout, marks_faults=marks)
    with opened_text(
        path, layout.encoding, newline="\n" if suffix_of(path) == ".tsv" else "", marks_faults=marks
    ) as file:
        rows = _plain_rows(file, dialect) if suffix_of(path) == ".tsv" else _quoted_rows(file, dialect.delimiter)
        if dialect.is_announced:
            next(rows)
        line, cells = next(rows, (1, []))
        header = _checked_header(cells, line)
        yield line, header
        for line, cells in rows:
            if len(cells) == len(header):
                yield line, cells
                continue
            error = BadRow(_wrong_length(cells, header, dialect.delimiter, path), line)
            if on_bad is None:
                raise error
            on_bad(error)


def found_dialect(path: Path, layout: TableFormat, *, marks_faults: bool = False) -> Dialect:
    """The delimiter that is set, or stands in a first line "sep=;", or divides header and first rows alike.

    Raises: Unreadable if two characters do.
    """
    if suffix_of(path) == ".tsv":
        delimiter = layout.character or "\t"
        return Dialect(delimiter, is_unquoted=_has_quoted_cells(path, layout, delimiter, marks_faults))
    with opened_text(path, layout.encoding, marks_faults=marks_faults) as file:
        head = file.read(SNIFFED_CHARACTERS)
    first = head.split("\n", 1)[0].rstrip("\r")
    if first.lower().startswith("sep=") and len(first) == len("sep=;"):  # how Excel is made to open it
        return Dialect(layout.character or first[-1], is_announced=True)
    if layout.delimiter:
        return Dialect(layout.character)
    is_whole = len(head) < SNIFFED_CHARACTERS
    widths = {mark: _widths(head, mark, is_whole) for mark in DELIMITERS}
    several = [mark for mark in DELIMITERS if widths[mark] and widths[mark][0] > 1]
    regular = [mark for mark in several if len(set(widths[mark])) == 1]
    if len(regular) > 1:
        marks = " and ".join(map(repr, regular))
        raise BadRow(f"both {marks} divide every row into as many cells as the header; set delimiter", 1)
    return Dialect((regular or several or [","])[0])


def _has_quoted_cells(path: Path, layout: TableFormat, delimiter: str, marks_faults: bool) -> bool:
    """Whether each cell of a .tsv with a quote is written as in CSV, and a doubled quote shows that this is meant."""
    is_shown = False
    with opened_text(path, layout.encoding, newline="\n", marks_faults=marks_faults) as file:
        for line in file:
            if '"' in line:
                cells = [cell for cell in line.rstrip("\r\n").split(delimiter) if '"' in cell]
                if not all(map(QUOTED.fullmatch, cells)):
                    return False
                is_shown |= any('""' in cell[1:-1] for cell in cells)
    return is_shown


def _widths(head: str, delimiter: str, is_whole: bool) -> list[int]:
    """Cells of the first rows; none where the delimiter leaves quotes open or misplaced."""
    rows = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
    found = [len(row) for row in islice(rows, SNIFFED_ROWS + 1) if row]
    return found if is_whole and len(found) <= SNIFFED_ROWS else found[:-1]  # the last one may be cut


def _plain_rows(file: TextIO, dialect: Dialect) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        content = line.rstrip("\r\n")
        if content:
            cells = content.split(dialect.delimiter)
            if dialect.is_unquoted:
                cells = [cell[1:-1].replace('""', '"') if cell.startswith('"') else cell for cell in cells]
            yield number, cells


def _quoted_rows(file: TextIO, delimiter: str) -> Iterator[Row]:
    rows, first = csv.reader(file, delimiter=delimiter, strict=True), 1
    try:
        for cells in rows:
            if cells:
                yield first, cells
            first = rows.line_num + 1
    except csv.Error as error:
        raise Unreadable(
            f"{error}: a cell that begins with a double quote must end with one, and double those within; "
            "a file without such quoting is a .tsv",
            first,
        ) from error


def _checked_header(cells: list[str], line: int) -> list[str]:
    names = [cell.strip().removeprefix("\ufeff") for cell in cells]
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        places = [", ".join(str(place) for place, name in enumerate(names, 1) if name == one) for one in twice]
        found = "; ".join(f"{one!r} (columns {where})" for one, where in zip(twice, places, strict=True))
        raise BadRow(f"the header names a column twice: {found}; rename or remove one of them", line)
    return names


def _wrong_length(cells: list[str], header: list[str], delimiter: str, path: Path) -> str:
    names = ", ".join(header)
    counted = f"the row has {len(cells)} fields, the header {len(header)}"
    if suffix_of(path) == ".tsv":
        return (
            f"{counted} ({names}); .tsv is read without quoting: take tabs and line breaks out of the cells, or let "
            "the name of a file with quoted cells end in .csv"
        )
    remedy = f"quote the fields that hold {delimiter!r}"
    return f"{counted}; {remedy}, or set delimiter if it is another (the columns are {names})"
