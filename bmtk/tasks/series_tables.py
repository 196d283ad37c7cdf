"""Tables of series: how they are split in order of time, and which steps of a series belong to a split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from bmtk.data.series import Series, SeriesColumns, bounds, read_series, shared_steps
from bmtk.data.series_rows import one_row_a_step
from bmtk.data.tables import SPLITS, check_column, named_files, one_table, read_table
from bmtk.data.time_formats import NAMED_FORMATS, ORDERS, UNITS, TimeFormat, check_time_format
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .task import Task
from .task_data import DataArguments, TaskData

Range = tuple[Series, int, int]  # a series, and the first and the last step (exclusive) of a split

MISSING_VALUES = ("stop", "fill", "mask")
USUAL_SPLIT = (0.7, 0.1, 0.2)
NO_TIMES = "none"
TIME_NAMES = ("date", "datetime", "ds", "start", "time", "timestamp")  # of a column, where none is set


@dataclass
class SeriesTableArguments(DataArguments):
    """Which columns, and which rows train, validate and test."""

    time_column: str = fact(
        TIME_NAMES[0],
        f"column of the time stamps; none: the rows are in order and have none; default: {', '.join(TIME_NAMES)}, "
        "whichever is there",
    )
    time_format: str | None = fact(
        None,
        f"how time stamps are written: {', '.join(NAMED_FORMATS)}, or a pattern such as '%d.%m.%Y %H:%M'; default: "
        "found in the whole column",
    )
    target_columns: list[str] | None = fact(None, "columns to forecast; default: all that hold numbers")
    id_column: str | None = fact(None, "column that names the series of a row, if a table holds several")
    split_rows: list[float] | None = fact(
        None,
        "how one table is split, in order of time: rows of training, validation and test, or shares [0.7 0.1 0.2]; "
        "the first windows of a part have their context in the part before it",
    )
    missing_values: str = setting(
        "stop",
        "cells without a number: stop (an error), fill (the value before it is read) or mask (the model sees that it "
        "is missing); never a target of loss or metrics",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_column:
            raise UserError(f"group_column={self.group_column!r}: of series the end is held out; leave it out")
        if self.missing_values not in MISSING_VALUES:
            raise UserError(
                f"missing_values={self.missing_values!r} is unknown; choose one of {', '.join(MISSING_VALUES)}"
            )
        check_time_format(self.time_format)
        shares = self.split_rows
        if shares and (
            min(shares) < 0 or not 2 <= len(shares) <= 3 or shares[0] == 0 or sum(shares) > 1 >= max(shares)
        ):
            raise UserError(
                f"split_rows={shares} must be two or three numbers for training, validation and test: rows, or shares "
                "that add up to 1 at most"
            )


@dataclass(frozen=True)
class TableParts:
    """The consecutive parts of one table that are splits; the default: every split has a table of its own."""

    shares: Sequence[float] = ()  # of the table, or numbers of rows
    positions: Mapping[str, int] = field(default_factory=dict)  # split -> which of the shares it is

    def __contains__(self, split: str) -> bool:
        return split in self.positions

    def range_of(self, series: Series, split: str) -> Range:
        """The steps of a series that are `split`.  Raises: UserError if the series ends before."""
        first, last = bounds(len(series), self.shares)[self.positions[split]]
        if last > len(series):
            shares = ", ".join(f"{share:g}" for share in self.shares)
            name = f"series {series.name!r}" if series.name else "the table"
            raise UserError(
                f"split_rows=[{shares}] ends with row {last:,}; {name} has {len(series):,} rows: give shares, which "
                "fit any table (split_rows 0.7 0.1 0.2)"
            )
        return series, first, last

    def num_unused(self, series: Series) -> int:
        """Steps at the end that belong to no part."""
        return len(series) - bounds(len(series), self.shares)[-1][1] if self.positions else 0


class SeriesData(TaskData):
    """Whole tables: which of their columns are read is known when the model is."""

    cuts_one_table = True

    def __init__(self, task: Task, args: SeriesTableArguments, **reading: Any):
        self.parts = TableParts()
        self.id_column: str | None = args.id_column
        # By the id of a table that has one row a series: the table, kept so that no other gets its id, and its steps.
        self._steps: dict[int, tuple[Dataset, Dataset]] = {}
        super().__init__(task, args, **reading)

    def readable_rows(self, table: Dataset, where: str) -> Dataset:
        """One row for each step.  A table that is cut into splits stays one table."""
        if id(table) not in self._steps:
            time_column = None if self.args.time_column == NO_TIMES else self.args.time_column
            found, self.id_column, note = one_row_a_step(
                table,
                where,
                time_column=time_column,
                id_column=self.args.id_column,
                time_format=self.args.time_format,
            )
            self._steps[id(table)] = table, found
            self.notes += [note] if note else []
        return self._steps[id(table)][1]

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        if self.id_column is not None:
            check_column(table, self.id_column, option="id_column", where=where)
        name = self.args.time_column
        if name != NO_TIMES and name not in table.column_names:
            raise UserError(
                f"time_column={name!r} is not in the {where} data; its columns are {', '.join(table.column_names)}; "
                "time_column=none reads the rows in their order"
            )
        return table

    def _tables(self, splits: Sequence[str]) -> dict[str, Dataset]:
        """One table stands for all the splits that it is cut into; else each has a table of its own."""
        args = self.args
        files = one_table(args.dataset) if args.dataset else args.train_file
        if not splits or not files or args.validation_file or args.test_file:
            return super()._tables(splits)
        files = named_files([str(file) for file in files], "train_file")
        table = read_table(files, args.layout, self.notes)
        shares = args.split_rows or USUAL_SPLIT
        named = enumerate(SPLITS[: len(shares)])
        self.parts = TableParts(shares, {split: position for position, split in named if shares[position]})
        if args.split_rows is None:
            self.notes.append(f"one table: {_percent(USUAL_SPLIT)} of it train, validate and test, in order of time")
        return {split: table for split in splits if split in self.parts}

    def _use_own_columns(self, tables: Mapping[str, Dataset]) -> None:
        """Also a column of times under another usual name than the default, if there is just one."""
        super()._use_own_columns(tables)
        names = {column for table in tables.values() for column in table.column_names}
        found = [name for name in names if name.lower() in TIME_NAMES]
        if self.args.time_column == TIME_NAMES[0] and self.args.time_column not in names and len(found) == 1:
            self.args.time_column = found[0]
            self.notes.append(f"columns: time_column={found[0]}")

    def _with_validation(self, tables: dict[str, Dataset], splits: Sequence[str]) -> dict[str, Dataset]:
        return tables if self.parts.positions else super()._with_validation(tables, splits)

    def _held_out(self, table: Dataset) -> dict[str, Dataset]:
        """The end of every series."""
        share = self.args.validation_fraction
        self.parts = TableParts((1 - share, share), {"train": 0, "validation": 1})
        percent = _percent(self.parts.shares[1:])
        self.notes.append(f"there are no validation rows: the last {percent} of the training rows are held out")
        return {"train": table, "validation": table}

    def _keep_apart(self) -> None:
        """Windows of one table overlap in their context only; `SeriesTables.keep_steps_apart` looks at others."""


class SeriesTables:
    """The series of `columns` in the tables of some data.  Each table is read once, when it is first asked for."""

    def __init__(self, data: SeriesData, columns: Sequence[str]):
        self.data, self.args, self.notes, self.parts, self.columns = data, data.args, data.notes, data.parts, columns
        self.known: dict[str, Any] = {}  # how the stamps of the training rows are written, where that needs saying
        # By the id of the table, which is kept beside its series: no other table can get its id.
        self._read: dict[int, tuple[Dataset, list[Series]]] = {}

    def series(self, table: Dataset, where: str) -> list[Series]:
        """Raises: UserError if a column is missing, or what it holds cannot be used."""
        if id(table) not in self._read:
            rows = "rows" if where in self.parts else f"{where} rows"
            self._read[id(table)] = table, self._series(table, rows)
        return self._read[id(table)][1]

    def ranges(self, table: Dataset, where: str) -> list[Range]:
        """Each series of a table, and the steps of it that are the split `where`."""
        series = self.series(table, where)
        if where in self.parts:
            return [self.parts.range_of(one, where) for one in series]
        return [(one, 0, len(one)) for one in series]

    def keep_steps_apart(self, rows: Mapping[str, Dataset]) -> None:
        """See to it that no step is trained on that is measured on, where splits have tables of their own."""
        train = self.ranges(rows["train"], "train")
        for split in (split for split, table in rows.items() if table is not rows["train"]):
            shared = shared_steps(self.ranges(rows[split], split), train)
            if not shared:
                continue
            found = f"{len(shared):,} of the {split} rows are training rows, too (the first: {shared[0]})"
            if self.args.leakage != "allow":
                raise UserError(f"{found}; take them out of one of the files, or set leakage=allow")
            self.notes.append(f"{found}: the results on these are not honest")

    def note_unused_rows(self, table: Dataset) -> None:
        """Note how many rows of a table that is cut are in no split."""
        unused = sum(map(self.parts.num_unused, self.series(table, "train")))
        if unused:
            self.notes.append(f"split_rows leaves {unused:,} rows at the end unused")

    def _series(self, table: Dataset, where: str) -> list[Series]:
        args = self.args
        for name in self.columns:
            check_column(table, name, option="target_columns", where=where.removesuffix(" rows"))
        series, notes = read_series(
            table,
            SeriesColumns(
                self.columns,
                time=None if args.time_column == NO_TIMES else args.time_column,
                name=self.data.id_column,
                time_format=args.time_format,
                known=self.known,
            ),
            may_have_gaps=args.missing_values != "stop",
            where=where,
        )
        self.notes += notes
        if not self.known:  # training rows are read first
            self.known = known_format(series[0].time_format)
        return series


def known_format(found: TimeFormat | None) -> dict[str, Any]:
    """What later tables of the same series should know of the time stamps; nothing of usual ones without an offset."""
    if found is None or (found.name not in (*UNITS, *ORDERS) and found.zone is None):
        return {}
    named = {} if found.name == "year_first" else {"time_format": found.name}
    return named | ({} if found.zone is None else {"utc_offset": found.clock})


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)
