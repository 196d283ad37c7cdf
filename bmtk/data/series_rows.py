"""Tables with one row a series, whose cells are lists of numbers, as tables with one row a step."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
from datasets import Dataset

from bmtk.errors import UserError

from .times import read_times

NAME_COLUMNS = ("id", "item_id", "series_id", "unique_id", "ts_id", "series", "name")
STEP_COLUMNS = ("freq", "frequency", "step")
NEW_NAME = "series"  # the column that names series which have no name


def list_columns(table: Dataset, time_column: str | None) -> dict[str, list[list[Any]]]:
    """The columns whose cells are lists of numbers, parsed where a CSV file holds them as text."""
    found = {}
    for name in table.column_names:
        first = next((cell for cell in table[name] if cell is not None), None)
        is_text = isinstance(first, str) and first.strip().startswith("[") and first.strip().endswith("]")
        if name == time_column or not (isinstance(first, list) or is_text):
            continue
        cells = [_list(cell, f"{name} of row {row}") for row, cell in enumerate(table[name], 1)]
        if any(isinstance(item, int | float) for cell in cells for item in cell[:1]):
            found[name] = cells
    return found


def _list(cell: Any, place: str) -> list[Any]:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            try:
                cell = [float(word) for word in cell.strip()[1:-1].replace(",", " ").split()]  # as numpy prints them
            except ValueError:
                raise UserError(f"{place} is no list of numbers: {cell[:80]!r}") from None
    if not isinstance(cell, list):
        raise UserError(f"{place} holds {str(cell)[:80]!r} where other rows hold a list of numbers")
    if any(isinstance(item, list) for item in cell):
        raise UserError(f"{place} is a list of lists; give each of them a column of its own")
    return cell


def one_row_a_step(
    table: Dataset, where: str, *, time_column: str | None, id_column: str | None, time_format: str | None
) -> tuple[Dataset, str | None, str]:
    """The table with a row for each step, the column of the names of its series, and a note.

    A table without lists of numbers stays as it is.  Raises: UserError for lists of unequal length in a row.
    """
    lists = list_columns(table, time_column)
    if not lists:
        return table, id_column, ""
    lengths = [len(cell) for cell in next(iter(lists.values()))]
    for name, cells in lists.items():
        for row, (cell, length) in enumerate(zip(cells, lengths, strict=True)):
            if len(cell) != length:
                raise UserError(
                    f"{where} row {row + 1}: {name} has {len(cell)} values and {next(iter(lists))} {length}; a series "
                    "needs as many of each"
                )
    columns = {name: [item for cell in cells for item in cell] for name, cells in lists.items()}
    if time_column and time_column in table.column_names:
        columns[time_column] = _stamps(table, lengths, where, time_column, time_format)
    id_column = id_column or _name_column(table)
    if id_column or len(table) > 1:
        names = table[id_column] if id_column else range(1, len(table) + 1)
        id_column = id_column or NEW_NAME
        columns = {
            id_column: [str(name) for name, length in zip(names, lengths, strict=True) for _ in range(length)],
            **columns,
        }
    note = f"{where}: one row a series: {len(table):,} series of {min(lengths):,} to {max(lengths):,} steps"
    return Dataset.from_dict(columns), id_column, note + (f", named by {id_column}" if id_column else "")


def _name_column(table: Dataset) -> str | None:
    """The first column that looks like names and has no name twice."""
    known = (name for name in table.column_names if name.lower() in NAME_COLUMNS)
    return next((name for name in known if len(set(map(str, table[name]))) == len(table)), None)


def _stamps(
    table: Dataset, lengths: Sequence[int], where: str, time_column: str, time_format: str | None
) -> list[object]:
    """The stamps of all steps: a list in each row, or its first stamp and, in another column, its step."""
    cells = list(table[time_column])
    if isinstance(cells[0], str) and cells[0].strip().startswith("["):
        cells = [json.loads(cell) for cell in cells]
    if isinstance(cells[0], list):
        for row, (cell, length) in enumerate(zip(cells, lengths, strict=True), 1):
            if len(cell) != length:
                raise UserError(f"{where} row {row}: {time_column} has {len(cell)} time stamps for {length} values")
        return [stamp for cell in cells for stamp in cell]
    steps = next((name for name in STEP_COLUMNS if name in table.column_names), None)
    if steps is None:
        raise UserError(
            f"{where}: {time_column} holds the first time stamp of each series, {cells[0]!r}, and no column "
            f"{' or '.join(STEP_COLUMNS)} the step between two (such as 1h or 1D); add it, or set time_column=none"
        )
    starts = read_times(cells, f"{where}: {time_column}", time_format=time_format).stamps
    found: list[object] = []
    for row, (start, step, length) in enumerate(zip(starts, table[steps], lengths, strict=True), 1):
        try:
            found += map(str, pd.date_range(start, periods=length, freq=step))
        except ValueError as error:
            raise UserError(f"{where} row {row}: {steps}={step!r} is no step such as 1h or 1D ({error})") from error
    return found
