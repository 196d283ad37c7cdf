"""Columns of tables that stay where they are: in a file that is mapped into memory, or in a selection of its rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow

from .row_batches import CHARACTERS_AT_ONCE, ROWS_AT_ONCE


def with_columns(rows: datasets.Dataset, columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """`rows` with more columns, which have a value for each row; nothing of the other columns is copied.

    `Dataset.add_column` writes all rows of a selection anew first, which takes gigabytes where they are images.
    """
    added = datasets.Dataset.from_dict(dict(columns))
    values = added.data.table
    if rows._indices is not None:
        order = rows._indices.column(0).to_numpy()
        places, is_chosen = np.zeros(rows.data.num_rows, np.int64), np.zeros(rows.data.num_rows, bool)
        places[order], is_chosen[order] = np.arange(len(order)), True
        if is_chosen.sum() < len(order):  # a row that was chosen twice has two values
            rows = rows.flatten_indices()
        else:
            values = values.take(pyarrow.array(places, mask=~is_chosen))
    table = datasets.table.concat_tables([rows.data, datasets.table.InMemoryTable(values)], axis=1)
    info = datasets.DatasetInfo(features=datasets.Features({**rows.features, **added.features}))
    return datasets.Dataset(table, info=info, indices_table=rows._indices)


def rows_at_once(rows: datasets.Dataset) -> int:
    """How many rows are changed together: as many as a batch of a file that is read has."""
    held = rows.data
    return max(1, min(ROWS_AT_ONCE, CHARACTERS_AT_ONCE * held.num_rows // max(1, held.nbytes)))


def first_missing(rows: datasets.Dataset, column: str) -> int | None:
    """The first row without a value in `column`; None if all have one.  No value is read."""
    values = rows.data.column(column)
    if not values.null_count:
        return None
    is_missing = values.is_null()
    if rows._indices is not None:
        is_missing = is_missing.take(rows._indices.column(0))
    place = is_missing.index(True).as_py()
    return None if place < 0 else int(place)


def cells(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    """The values of a column, read some rows at a time (iterating over the column itself takes ten times as long)."""
    rows = rows.select_columns(column)
    for batch in rows.iter(batch_size=max(1, rows_at_once(rows) // 4)):
        yield from batch[column]
