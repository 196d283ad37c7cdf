"""Rows of JSON files as they are written: a string stays a string, a whole number keeps all of its digits."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from .long_lines import PART, LineReader
from .text_files import BadRow, Span, TableFormat, is_damaged, opened_text, suffix_of

SUFFIXES = (".jsonl", ".json")
JsonRow = tuple[str, dict[str, Any]]  # where it stands ("line 3", or "row 3" of a list), and its values


def json_rows(path: Path, layout: TableFormat) -> Iterator[JsonRow]:
    """The objects of JSON lines; of .json also those of a list, or the columns of one object.

    Raises: BadRow for what is no JSON or no object, and for a name that an object has twice.
    """
    return json_lines(path, layout) if suffix_of(path) == ".jsonl" else _whole(path, layout)


def json_lines(
    path: Path,
    layout: TableFormat,
    *,
    span: Span | None = None,
    on_bad: Callable[[BadRow], None] | None = None,
    long_line: int = -1,
) -> Iterator[JsonRow]:
    """As `json_rows`, of those bytes of the file that `span` has; a bad line is left to `on_bad`, if that is given.

    Of lines with `long_line` characters or more (-1: of none), long values become `LongString`, which can be read
    until the next row is asked for; long strings within a list or an object are not kept.
    """
    # Lines end in "\n" alone: JSON strings may hold other ends of lines, such as U+2028
    with opened_text(path, layout.encoding, newline="\n", span=span, marks_faults=on_bad is not None) as file:
        number = 0
        while line := file.readline(long_line):
            number += 1
            if len(line) == long_line and line[-1] != "\n":
                # In parts, as the regular expression for strings keeps some 25 bytes for each character of escapes.
                begun = (line[start : start + PART] for start in range(0, len(line), PART))
                rest = _rest_of_line(file)
                with tempfile.TemporaryFile() as spool:
                    row = _unless_bad(partial(_long_line, chain(begun, rest), number, spool), on_bad)
                    if row is not None:
                        yield f"line {number}", row
                for _ in rest:  # of a bad line
                    pass
            elif not line.isspace():
                row = _unless_bad(partial(_line, line, number), on_bad)
                if row is not None:
                    yield f"line {number}", row


def _unless_bad(
    read: Callable[[], dict[str, Any] | None], on_bad: Callable[[BadRow], None] | None
) -> dict[str, Any] | None:
    try:
        return read()
    except BadRow as error:
        if on_bad is None:
            raise
        on_bad(error)
        return None


def _rest_of_line(file: TextIO) -> Iterator[str]:
    while part := file.readline(PART):
        yield part
        if part[-1] == "\n":
            return


def _line(line: str, number: int) -> dict[str, Any]:
    _refuse_damage(line, number)
    try:
        value = _read(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"not a line of JSON ({error})", number) from error
    return _checked_row(value, number)


def _long_line(parts: Iterable[str], number: int, spool: BinaryIO) -> dict[str, Any] | None:
    """The same of a line in parts, whose long strings go to `spool`; None if it is blank."""
    reader = LineReader(spool)
    try:
        for part in parts:
            _refuse_damage(part, number)
            reader.read(part)
        if reader.rest.isspace():
            return None
        value = _read(reader.rest)
    except json.JSONDecodeError as error:
        raise BadRow(f"not a line of JSON ({error.msg})", number) from error
    row = _checked_row(value, number)
    return {name: reader.strings.get(cell, cell) if isinstance(cell, str) else cell for name, cell in row.items()}


def _refuse_damage(text: str, number: int) -> None:
    if is_damaged(text):
        raise BadRow("it holds bytes that are not UTF-8", number)


def _whole(path: Path, layout: TableFormat) -> Iterator[JsonRow]:
    with opened_text(path, layout.encoding) as file:
        text = file.read()
    try:
        content = _read(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            yield from json_lines(path, layout)
            return
        raise BadRow(f"not JSON ({error.msg}, column {error.colno})", error.lineno) from error
    if isinstance(content, dict):
        content = _rows_of_columns(content)
    if not isinstance(content, list):
        raise BadRow(f"expected a list of JSON objects, found {type(content).__name__}")
    for number, value in enumerate(content, 1):
        if not isinstance(value, dict):
            raise BadRow(f"row {number}: expected a JSON object, found {type(value).__name__}")
        yield f"row {number}", value


def _rows_of_columns(content: dict[str, Any]) -> list[Any]:
    """{"text": [...], "label": [...]} or, as pandas writes it, {"text": {"0": ...}, ...}; else a single row.

    A list of objects under one name ({"data": [{...}]}) is one cell, as its rows are not those of a table.
    """
    columns = list(content.values())
    if columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        columns = [list(column.values()) for column in columns] if columns[0] else []
    is_table = (
        columns
        and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        and not (len(columns) == 1 and any(isinstance(cell, dict | list) for cell in columns[0]))
    )
    if not is_table:
        return [content]
    return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]


def _read(text: str) -> Any:
    return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_with_each_name_once)


def _with_each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise json.JSONDecodeError(f"an object has {twice!r} twice; rename or remove one of them", "", 0)
    return found


def _checked_row(value: Any, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = "; let the name of a file that is one list end in .json" if isinstance(value, list) else ""
        raise BadRow(f"expected a JSON object, found {type(value).__name__}{hint}", number)
    return value
