"""Tables of rows that are read as a stream: small ones lie in memory, large ones in a file that is mapped into it.

A column's type is the one that `pyarrow.array` finds for all of its values together.  So the rows are read twice, once
for the types; what is small enough is kept in between.
"""

import contextlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow

from bmtk.files import PARTIAL, replacing

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 1000, 1 << 22  # of a batch, at most (but one row)
DAY = 86_400  # seconds
SMALL = 1 << 24  # characters of a table that is kept in memory
NOTES = b"bmtk.notes"  # in the schema of a kept table: what was found when it was read
UNLIKE = (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError)

Columns = dict[Any, list[Any]]  # by their names, or their places
Types = dict[str, pyarrow.DataType | None]  # of columns; None: texts that are made of unlike values
SizedRow = tuple[int, Mapping[Any, Any]]  # about how many characters it has, and its values
logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Some rows; a column that none of them has may be left out."""

    num_characters: int  # about
    num_rows: int
    columns: Columns


class Batches:
    """Batches of rows that can be gone through again and again: they are kept if they are few, else read again."""

    def __init__(self, read: Callable[[], Iterator[Batch]]):
        self.read = read
        self.kept: list[Batch] | None = None

    @property
    def are_small(self) -> bool:
        """Whether all are kept, after the first time."""
        return self.kept is not None

    def __iter__(self) -> Iterator[Batch]:
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[Batch] | None = []
        left = SMALL
        for batch in self.read():
            left -= batch.num_characters
            kept = None if kept is None or left < 0 else [*kept, batch]
            yield batch
        self.kept = kept

    def changed(self, change: Callable[[Columns], Columns]) -> "ChangedBatches":
        return ChangedBatches(self, change)


class ChangedBatches:
    """What `change` makes of each batch."""

    def __init__(self, batches: Batches, change: Callable[[Columns], Columns]):
        self.batches, self.change = batches, change

    @property
    def are_small(self) -> bool:
        return self.batches.are_small

    def __iter__(self) -> Iterator[Batch]:
        return (batch._replace(columns=self.change(batch.columns)) for batch in self.batches)


def batched(rows: Iterable[SizedRow]) -> Iterator[Batch]:
    """The columns of some rows at a time; values that rows lack are None."""
    held: list[Mapping[Any, Any]] = []
    size = 0
    for characters, row in rows:
        held.append(row)
        size += characters
        if len(held) == ROWS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield Batch(size, len(held), _columns(held))
            held, size = [], 0
    if held:
        yield Batch(size, len(held), _columns(held))


def _columns(rows: Sequence[Mapping[Any, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def table_of(
    batches: Batches | ChangedBatches, *, where: str, notes: list[str], kept_at: Callable[[], Path]
) -> datasets.Dataset | None:
    """The table of all batches; None if there are no rows.  A large one is written to the file `kept_at`.

    A column of unlike values (numbers and texts) becomes texts, with a note that calls the table `where`.
    """
    types, kinds = _types(batches)
    if not types:
        return None

    def make_texts_of(column: str) -> None:
        types[column] = None
        found = ", ".join(sorted(kinds[column]))
        notes.append(f"column {column!r} of {where} holds unlike values ({found}): read as texts")

    for column, kind in types.items():
        # Numbers and truth values: Arrow takes a truth value for 1.0 or not, by what comes before it.
        if kind is None or kinds[column] > {"bool"}:
            make_texts_of(column)
    while True:
        try:
            schema = _schema(types)
            made = _record_batches(batches, types, schema)
            return _in_memory(made, schema) if batches.are_small else in_file(made, schema, kept_at(), notes)
        except _Unlike as unlike:  # numbers of one type that do not fit into it
            make_texts_of(unlike.column)


def kept_file(mark: str) -> Path:
    """Where a large table with this mark is kept, in the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "bmtk_tables" / f"{mark}.arrow"


def kept_table(path: Path, notes: list[str]) -> datasets.Dataset | None:
    """A table that was read before, with its notes; None if it was not, or its file is damaged."""
    if not path.is_file():
        return None
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
            found = json.loads((reader.schema.metadata or {})[NOTES])
        table = datasets.Dataset.from_file(str(path))
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        logger.warning("%s is damaged and made anew: %s", path, error)
        path.unlink(missing_ok=True)
        return None
    notes += found
    return table


class _Unlike(Exception):
    """The values of a column have no type in common."""

    def __init__(self, column: str):
        super().__init__(column)
        self.column = column


def _types(batches: Iterable[Batch]) -> tuple[Types, dict[str, set[str]]]:
    """The type of each column, and the names of the Python types of its values."""
    types: Types = {}
    kinds: dict[str, set[str]] = {}
    for batch in batches:
        for name, values in batch.columns.items():
            kinds.setdefault(name, set()).update({type(value).__name__ for value in values} - {"NoneType"})
            types[name] = _united(types.get(name, pyarrow.null()), values)
    return types, kinds


def _united(known: pyarrow.DataType | None, values: Sequence[Any]) -> pyarrow.DataType | None:
    """The type of a column of type `known` and more of its values; None if they are unlike."""
    if known is None:
        return None
    try:
        more = pyarrow.infer_type(values)
        one, other = (pyarrow.schema([("column", kind)]) for kind in (known, more))
        return pyarrow.unify_schemas([one, other], promote_options="permissive").field("column").type
    except UNLIKE:
        return None


def _array(name: str, values: Sequence[Any], kind: pyarrow.DataType | None) -> pyarrow.Array:
    if kind is None:
        return pyarrow.array([_as_text(value) for value in values], type=pyarrow.string())
    try:
        return pyarrow.array(values, type=kind)
    except UNLIKE as error:
        raise _Unlike(name) from error


def _as_text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _record_batches(batches: Iterable[Batch], types: Types, schema: pyarrow.Schema) -> Iterator[pyarrow.RecordBatch]:
    for batch in batches:
        nothing = [None] * batch.num_rows
        arrays = [_array(name, batch.columns.get(name, nothing), kind) for name, kind in types.items()]
        yield pyarrow.record_batch(arrays, schema=schema)


def _schema(types: Types) -> pyarrow.Schema:
    return pyarrow.schema([(name, pyarrow.string() if kind is None else kind) for name, kind in types.items()])


def _in_memory(batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema) -> datasets.Dataset:
    table = pyarrow.Table.from_batches(batches, schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table.combine_chunks()))


def delete_abandoned(path: Path) -> None:
    """Delete what processes that were killed have left of a kept file: what nobody has written to for a day."""
    for left in path.parent.glob(f"{PARTIAL}{path.stem}-*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes it, too
            if time.time() - left.stat().st_mtime > DAY:
                left.unlink()


def in_file(
    batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema, path: Path, notes: Sequence[str]
) -> datasets.Dataset:
    """The same in a file that `kept_table` finds again, with its notes."""
    schema = schema.with_metadata({**(schema.metadata or {}), NOTES: json.dumps(list(notes))})
    delete_abandoned(path)
    own = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.arrow")  # other processes may write the same table
    with replacing(own) as beside, pyarrow.ipc.new_stream(str(beside), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    os.replace(own, path)
    return datasets.Dataset.from_file(str(path))
