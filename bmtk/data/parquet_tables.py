"""Parquet files as tables: copied, some rows at a time, into a file in the cache of `datasets` that is mapped.

`datasets` makes such a file, too, but reads whole row groups ahead for it, so that its memory grows with the files.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

from bmtk.errors import UserError

from .media import undecoded, with_features
from .row_batches import CHARACTERS_AT_ONCE, ROWS_AT_ONCE, in_file
from .text_files import is_compressed
from .text_tables import kept_or_read


def read_parquet(paths: Sequence[Path], notes: list[str]) -> datasets.Dataset:
    """The columns and types of the first file hold for all; images and recordings are not decoded."""
    names = ", ".join(map(str, paths))
    for path in paths:
        _check(path)

    def read(found: list[str], kept_at: Callable[[], Path]) -> datasets.Dataset:
        schema = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(paths[0])).arrow_schema
        batches = (batch for path in paths for batch in _record_batches(path, schema, paths[0]))
        return in_file(batches, schema, kept_at(), found)

    rows = undecoded(kept_or_read(paths, None, notes, read))
    if not len(rows):
        raise UserError(f"{names} has no rows")
    return _with_texts_of_bytes(rows, names, notes)


def _check(path: Path) -> None:
    """Raise UserError for a file that is no Parquet, or has a column twice."""
    if is_compressed(path):
        raise UserError(f"{path} is compressed as a whole, which Parquet is within; unpack it")
    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"{path} has a column twice: {', '.join(twice)}; rename or remove one of them")


def _record_batches(path: Path, schema: pyarrow.Schema, first: Path) -> Iterator[pyarrow.RecordBatch]:
    """Its rows as of `schema`, that of the file `first`.

    Mapped, a row group is not copied into memory before it is read.
    """
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            about = file.metadata
            groups = (about.row_group(group) for group in range(about.num_row_groups))
            num_bytes = sum(group.total_byte_size for group in groups)  # unpacked
            at_once = max(1, min(ROWS_AT_ONCE, CHARACTERS_AT_ONCE * about.num_rows // max(1, num_bytes)))
            for batch in file.iter_batches(batch_size=at_once, use_threads=False):
                yield from datasets.table.table_cast(pyarrow.Table.from_batches([batch]), schema).to_batches()
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        where = path if path == first else f"{path}, beside {first},"
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {error}") from error


def _with_texts_of_bytes(rows: datasets.Dataset, where: str, notes: list[str]) -> datasets.Dataset:
    """Columns of bytes that are UTF-8 as texts; others stay bytes, which are refused where a text is needed."""
    texts = {}
    for field in rows.data.schema:
        if pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            try:
                rows.data.column(field.name).cast(pyarrow.large_string())
            except pyarrow.ArrowInvalid:
                continue
            notes.append(f"column {field.name!r} of {where} holds bytes: read as text in UTF-8")
            texts[field.name] = datasets.Value("large_string")
    return with_features(rows, texts) if texts else rows
