"""Rows of whole numbers, and of lists of them, read from the memory of a table: N rows."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset


class NumberLists(Sequence[list[int]]):
    """B lists one after the other: their `numbers` (N,), and the `lengths` (B,) of each."""

    def __init__(self, numbers: np.ndarray, lengths: np.ndarray):
        self.numbers, self.lengths = numbers, lengths

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "NumberLists":
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        return cls(np.fromiter(chain.from_iterable(lists), np.int64, int(lengths.sum())), lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: Any) -> Any:
        end = self.lengths[: range(len(self))[row] + 1].sum()
        return self.numbers[end - self.lengths[row] : end].tolist()

    def padded(self, value: int, *, width: int = 0, on_left: bool = False) -> np.ndarray:
        """(B, L), filled up with `value` to the longest list, or to `width`."""
        width = int(self.lengths.max(initial=width))
        places, lengths = np.arange(width), self.lengths[:, None]
        is_own = places >= width - lengths if on_left else places < lengths
        found = np.full(is_own.shape, value, np.int64)
        found[is_own] = self.numbers
        return found


class NumberBatch(Sequence[dict[str, Any]]):
    """Rows by column, numbers (B,) or lists of them, for whoever would only put them side by side again."""

    def __init__(self, columns: dict[str, np.ndarray | NumberLists]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: Any) -> Any:
        cells = {name: values[row] for name, values in self.columns.items()}
        return {name: cell if isinstance(cell, list) else cell.item() for name, cell in cells.items()}


class NumberRows:
    """The rows of a data set as it gives them itself, in a tenth of the time; other columns are left to it.

    Nothing is copied: a table that is mapped from a file stays there.
    """

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without `columns`, which another process maps again instead of having them copied."""
        return {"rows": self.rows}

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        if min(indices, default=0) < 0:
            raise IndexError(f"row {min(indices)} is below 0")
        if not self.columns:
            found: list[dict[str, Any]] = self.rows.__getitems__(list(indices))
            return found
        return NumberBatch({name: column.values(indices) for name, column in self.columns.items()})

    @cached_property
    def columns(self) -> dict[str, "NumberColumn"]:
        """Every column; none if the rows are a selection, or one of them holds something else."""
        table = self.rows.data.table
        is_plain = self.rows._indices is None and all(map(holds_numbers, table.columns))
        return {name: NumberColumn(table.column(name)) for name in table.column_names} if is_plain else {}


def holds_numbers(column: pyarrow.ChunkedArray) -> bool:
    """Whether a column holds whole numbers or lists of them, and none is missing."""
    kind, is_list = column.type, pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
    is_whole = pyarrow.types.is_integer(kind.value_type if is_list else kind)
    return is_whole and not any(chunk.null_count or (is_list and chunk.values.null_count) for chunk in column.chunks)


class NumberColumn:
    """One column that `holds_numbers`."""

    def __init__(self, column: pyarrow.ChunkedArray):
        self.ends = np.cumsum([len(chunk) for chunk in column.chunks])  # of its parts, in rows
        is_flat = pyarrow.types.is_integer(column.type)
        self.numbers = [(chunk if is_flat else chunk.values).to_numpy() for chunk in column.chunks]
        self.offsets = None if is_flat else [chunk.offsets.to_numpy() for chunk in column.chunks]

    def values(self, indices: Sequence[int]) -> np.ndarray | NumberLists:
        """A number or a list for each of the rows `indices`."""
        wanted = np.asarray(indices, dtype=np.int64)
        parts = np.searchsorted(self.ends, wanted, side="right")
        places = wanted - np.concatenate(([0], self.ends))[parts]
        pairs = zip(parts.tolist(), places.tolist(), strict=True)
        if self.offsets is None:
            return np.array([self.numbers[part][place] for part, place in pairs], dtype=np.int64)
        bounds = [(self.numbers[part], *self.offsets[part][place : place + 2].tolist()) for part, place in pairs]
        lists = [numbers[first:last] for numbers, first, last in bounds]
        lengths = np.array([len(numbers) for numbers in lists], dtype=np.int64)
        return NumberLists(np.concatenate(lists) if lists else np.zeros(0, np.int64), lengths)
