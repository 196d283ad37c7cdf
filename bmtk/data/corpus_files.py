"""The documents of one file, in pieces that fit into memory.  Imports nothing slow: worker processes use it.

A document is a text with a visible character.  It comes as pieces (text, ends): `ends` is True for its last one, which
may be empty.  Files are .txt, .jsonl, .csv, .tsv, .parquet and .arrow (of `datasets`, or Feather), each also
compressed (.gz, .bz2, .xz, .zst).
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from bmtk.errors import UserError

from .delimited import delimited_rows
from .json_rows import json_lines
from .long_lines import LONG_LINE, LongString
from .text_files import (
    BadRow,
    Span,
    TableFormat,
    Unreadable,
    is_compressed,
    is_damaged,
    opened_bytes,
    opened_text,
    suffix_of,
)

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet", ".tsv", ".arrow")
READ_CHARACTERS = 1 << 20  # of a document that is read piece by piece
ROWS_PER_READ = 256
Piece = tuple[str, bool]
OnBad = Callable[[str], None]


@dataclass(frozen=True)
class CorpusFile:
    """A file, or a part of one, and how its documents are found.

    `span` are bytes of a text or JSON-lines file that is not compressed, or row groups of a Parquet file; `begins` and
    `ends` are False where the only document of a text file goes on before or after them. With `skips`, what cannot be
    read is left out.
    """

    path: str
    text_column: str = "text"
    sample_by: str = "document"
    delimiter: str | None = None
    encoding: str | None = None
    skips: bool = False
    span: Span | None = None
    begins: bool = True
    ends: bool = True

    @property
    def layout(self) -> TableFormat:
        return TableFormat(self.delimiter, self.encoding)


def documents(file: CorpusFile) -> Iterator[str]:
    """Whole documents, each in memory."""
    parts: list[str] = []
    for text, ends in pieces_of(file):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []


def pieces_of(file: CorpusFile, on_bad: OnBad | None = None) -> Iterator[Piece]:
    """The pieces of the documents with a visible character; `on_bad` gets a sentence about each fault that is skipped.

    Raises: UserError that names file and row, unless faults are skipped.
    """
    report = (on_bad or _ignore) if file.skips else None
    path, suffix = Path(file.path), suffix_of(Path(file.path))
    is_open = not file.begins
    try:
        for text, ends in _visible(READERS[suffix](path, file, report), is_inside=is_open):
            is_open = not ends
            yield text, ends
    except Unreadable as error:
        message = _sentence(file, path, error)
        if report is None:
            raise UserError(message) from error
        report(f"{message}; the rest of the file is left out")
        if is_open and file.ends:
            yield "", True


def _ignore(message: str) -> None:
    pass


def _visible(pieces: Iterator[Piece], *, is_inside: bool) -> Iterator[Piece]:
    """Without blank documents; blanks are held back until a visible character follows."""
    held: list[str] = []
    for text, ends in pieces:
        if not is_inside and (not text or text.isspace()):
            held = [] if ends else [*held, text]
            continue
        yield "".join([*held, text]) if held else text, ends
        held, is_inside = [], not ends


def _sentence(file: CorpusFile, path: Path, error: Unreadable) -> str:
    """What is wrong, with file and line, the lines before the span counted."""
    if file.span is not None and error.line is not None and file.span[0]:
        error = type(error)(error.reason, error.line + _lines_before(path, file.span[0]))
    suffix, encoding = suffix_of(path), file.encoding or "UTF-8"
    if suffix == ".txt":
        return f"{error.sentence(path, f'{encoding} text')}; or convert it first, for example with iconv"
    if suffix == ".jsonl":
        is_row = isinstance(error, BadRow)
        return error.sentence(path, "JSON lines") if is_row else _of_json(path, error)
    if suffix in (".csv", ".tsv"):
        return error.sentence(path, f"a {suffix[1:].upper()} file in {encoding}")
    return error.sentence(path, "a Parquet file" if suffix == ".parquet" else "an Arrow file")


def _of_json(path: Path, error: Unreadable) -> str:
    place = "" if error.line is None else f", line {error.line}"
    return f"{path}{place}: not a line of JSON ({error.reason})"


def _lines_before(path: Path, stop: int) -> int:
    count = 0
    with path.open("rb") as file:
        while stop > 0 and (block := file.read(min(stop, READ_CHARACTERS))):
            count, stop = count + block.count(b"\n"), stop - len(block)
    return count


# --------------------------------------------------------------------------------------------------- kinds of files


def _read_txt(path: Path, file: CorpusFile, report: OnBad | None) -> Iterator[Piece]:
    is_whole = file.sample_by == "document"
    # newline="" keeps "\r\n" of a whole document as it is; lines lose their ends, of either kind
    newline, marks = "" if is_whole else None, not is_whole and report is not None
    with opened_text(path, file.encoding, newline=newline, span=file.span, marks_faults=marks) as content:
        if is_whole:
            while text := content.read(READ_CHARACTERS):
                yield text, False
            if file.ends:
                yield "", True
            return
        yield from _lines(content, lambda number: _refuse_line(path, file, number, report))


def _lines(content: TextIO, refuse: Callable[[int], None]) -> Iterator[Piece]:
    """Each line is a document; of a damaged one, `refuse` gets the number."""
    number, is_open, is_bad = 1, False, False
    while text := content.readline(READ_CHARACTERS):
        is_open = not text.endswith("\n")
        if not is_bad and is_damaged(text):
            refuse(number)
            is_bad = True
        yield "" if is_bad else text.removesuffix("\n"), not is_open
        number, is_bad = number + (not is_open), is_bad and is_open
    if is_open:
        yield "", True


def _refuse_line(path: Path, file: CorpusFile, number: int, report: OnBad | None) -> None:
    error = Unreadable("it holds bytes that are not UTF-8", number)
    if report is None:  # never, as the text is then read strictly
        raise error
    report(_sentence(file, path, error))


def _read_jsonl(path: Path, file: CorpusFile, report: OnBad | None) -> Iterator[Piece]:
    def skip(error: BadRow) -> None:
        report and report(_sentence(file, path, error))

    bad = skip if report else None
    for place, row in json_lines(path, file.layout, span=file.span, on_bad=bad, long_line=LONG_LINE):
        try:
            if file.text_column not in row:
                raise _NoColumn(file.text_column, list(row))
            yield from _cell(row[file.text_column], file.text_column)
        except (_NoColumn, _NoText) as error:
            number = int(place.rpartition(" ")[2]) + (_lines_before(path, file.span[0]) if file.span else 0)
            _refuse(error.sentence(f"{path}, line {number}"), report)


def _read_delimited(path: Path, file: CorpusFile, report: OnBad | None) -> Iterator[Piece]:
    def skip(error: BadRow) -> None:
        report and report(_sentence(file, path, error))

    rows = delimited_rows(path, file.layout, on_bad=skip if report else None)
    _, header = next(rows)
    column = _place_of(file.text_column, header, path)
    for line, cells in rows:
        try:
            yield _checked_text(cells[column], file.text_column), True
        except _NoText as error:
            _refuse(error.sentence(f"{path}, line {line}"), report)


def _read_parquet(path: Path, file: CorpusFile, report: OnBad | None) -> Iterator[Piece]:
    import pyarrow.parquet  # slow to import, and only needed here

    row = 0
    try:
        with _seekable(path) as content, pyarrow.parquet.ParquetFile(content) as table:
            _place_of(file.text_column, table.schema_arrow.names, path)
            first, last = file.span or (0, table.num_row_groups)
            row = sum(table.metadata.row_group(group).num_rows for group in range(first))
            how = {"batch_size": ROWS_PER_READ, "columns": [file.text_column], "row_groups": range(first, last)}
            for batch in table.iter_batches(**how) if last > first else ():
                yield from _cells(batch.column(0), row, file, report)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _of_columns(error, row) from error


def _read_arrow(path: Path, file: CorpusFile, report: OnBad | None) -> Iterator[Piece]:
    import pyarrow.ipc

    row = 0
    try:
        with _seekable(path) as content, _arrow_batches(content) as (names, batches):
            column = _place_of(file.text_column, names, path)
            for batch in batches:
                yield from _cells(batch.column(column), row, file, report)
                row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _of_columns(error, row) from error


@contextmanager
def _arrow_batches(content: BinaryIO) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """Column names and record batches of an Arrow file or stream."""
    import pyarrow.ipc

    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    with pyarrow.ipc.open_file(content) if is_file else pyarrow.ipc.open_stream(content) as reader:
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        yield reader.schema.names, batches


def _cells(column: Any, first: int, file: CorpusFile, report: OnBad | None) -> Iterator[Piece]:
    """Texts of a column whose first value is in row `first`, from 0."""
    for start in range(0, len(column), ROWS_PER_READ):
        values = column.slice(start, ROWS_PER_READ)
        is_small = values.nbytes < LONG_LINE
        for number, value in enumerate(values.to_pylist() if is_small else map(_value, values), first + start + 1):
            try:
                yield from _cell(value, file.text_column)
            except _NoText as error:
                _refuse(error.sentence(f"{file.path}, row {number:,}"), report)


def _cell(value: object, text_column: str) -> Iterator[Piece]:
    """A document.  Raises: _NoText, before anything is yielded."""
    if not isinstance(value, LongString):
        yield _checked_text(value, text_column), True
        return
    if value.fault:
        raise _NoText(f"the text is not Unicode ({value.fault}); repair or remove it")
    yield from ((text, False) for text in value.pieces())
    yield "", True


def _value(scalar: Any) -> object:
    """A value of an Arrow column; a long text stays where it is."""
    buffer = scalar.as_buffer() if scalar.is_valid and hasattr(scalar, "as_buffer") else None
    if buffer is None or buffer.size < LONG_LINE:
        return scalar.as_py()
    import pyarrow

    text = LongString(pyarrow.BufferReader(buffer), 0, buffer.size)
    try:
        for _ in text.pieces():
            pass
    except UnicodeDecodeError as error:
        return dataclasses.replace(text, fault=str(error))
    return text


def _of_columns(error: Exception, row: int) -> Unreadable:
    if isinstance(error, OSError) and error.errno is not None and not row:  # of the disk
        raise error
    return Unreadable(f"after row {row:,}: {error}" if row else str(error))


@contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The file, or its unpacked content, which is kept on the disk meanwhile."""
    if not is_compressed(path):
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        with opened_bytes(path) as content:
            shutil.copyfileobj(content, unpacked, 1 << 20)
        unpacked.seek(0)
        yield unpacked


READERS: dict[str, Callable[[Path, CorpusFile, OnBad | None], Iterator[Piece]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# --------------------------------------------------------------------------------------------------- columns, cells


class _NoColumn(Exception):
    """A row without the column."""

    def __init__(self, column: str, columns: list[str]):
        super().__init__(column)
        self.column, self.columns = column, columns

    def sentence(self, where: object) -> str:
        return f"text_column={self.column!r} is not in {where}; the columns there are {self.columns}"


class _NoText(Exception):
    """A value that is no text; `reason` may hold {where}."""

    def __init__(self, reason: str):
        super().__init__(reason)

    def sentence(self, where: object) -> str:
        return f"{where}: {self}"


def _refuse(message: str, report: OnBad | None) -> None:
    if report is None:
        raise UserError(message)
    report(message)


def check_column(text_column: str, columns: list[str], where: object) -> None:
    """Raise UserError for a table without the column, whatever is skipped: it is no fault of a row."""
    if text_column not in columns:
        raise UserError(_NoColumn(text_column, columns).sentence(where))


def _place_of(text_column: str, columns: list[str], where: object) -> int:
    check_column(text_column, columns, where)
    return columns.index(text_column)


def checked_text(value: object, text_column: str, where: object) -> str:
    """`value` as a text that UTF-8 can hold; a missing value is a blank text.  Raises: UserError."""
    try:
        return _checked_text(value, text_column)
    except _NoText as error:
        raise UserError(error.sentence(where)) from error


def _checked_text(value: object, text_column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _NoText(f"text_column={text_column!r} holds bytes that are not UTF-8 ({error})") from error
    if not isinstance(value, str):
        raise _NoText(f"text_column={text_column!r} holds {type(value).__name__}, expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _NoText(f"the text is not Unicode ({error}); repair or remove it") from error
    return value
