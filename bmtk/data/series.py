"""Numbers over time: series read from tables, and what follows from their time stamps.  C columns."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from bmtk.errors import UserError

from .time_formats import TimeFormat
from .time_steps import DAY, NO_TIME, regular_step, step_in_words, times_after, usual_step
from .times import MISSING_WORDS, read_times

SHOWN = 3  # gaps, repeated stamps and odd steps that a note names
HOUR = pd.Timedelta(hours=1)

# Name -> where in the cycle a time stamp is, from 0 to 1.
CALENDAR = {
    "minute": lambda times: times.minute / 60,
    "hour": lambda times: (times.hour + times.minute / 60) / 24,
    "weekday": lambda times: times.day_of_week / 7,
    "monthday": lambda times: (times.day - 1) / 31,
    "yearday": lambda times: (times.day_of_year - 1) / 366,
    "month": lambda times: (times.month - 1) / 12,
}


@dataclass(frozen=True)
class Series:
    """Numbers over time: `values` (steps, C), NaN where missing; without time stamps `times` is None."""

    name: str
    values: np.ndarray
    times: pd.DatetimeIndex | None
    time_format: TimeFormat | None = None  # how `times` were written

    def __len__(self) -> int:
        return len(self.values)

    def extended(self, steps: int) -> "Series":
        """With `steps` more steps, whose values are missing."""
        times = None if self.times is None else self.times.append(times_after(self.times, steps))
        return replace(self, values=np.pad(self.values, ((0, steps), (0, 0)), constant_values=np.nan), times=times)


# ------------------------------------------------------------------------------------------------ tables


def numeric_columns(table: Dataset, others: Collection[str]) -> tuple[list[str], list[str]]:
    """Columns besides `others` in which at least half of the cells are numbers, and the remaining ones."""
    names = [name for name in table.column_names if name not in others]
    numeric = [name for name in names if np.isfinite(_numbers(table[name])).mean() >= 0.5]
    return numeric, [name for name in names if name not in numeric]


@dataclass(frozen=True)
class SeriesColumns:
    """Which columns of a table are read, and how its time stamps are written."""

    values: Sequence[str]
    time: str | None
    name: str | None  # column with the name of each row's series
    time_format: str | None = None  # as for `read_times`
    known: Mapping[str, Any] | None = None  # likewise


def read_series(
    table: Dataset, columns: SeriesColumns, *, may_have_gaps: bool, where: str
) -> tuple[list[Series], list[str]]:
    """A series for each name (one, if there is no column of names), in order of time; and what is odd, in words.

    Raises: UserError for an invalid time stamp, for a column without numbers, and for gaps unless there may be
    any.
    """
    values, notes = np.stack([_numbers(table[name]) for name in columns.values], axis=1), []
    if gaps := _gaps(table, columns.values, values):
        notes.append(f"{where}: {gaps}")
        if not may_have_gaps:
            raise UserError(
                f"{notes[0]}.  missing_values=fill reads the value before a gap, missing_values=mask tells the model"
            )
        if empty := [name for name, column in zip(columns.values, values.T, strict=True) if np.isnan(column).all()]:
            raise UserError(f"{where}: {', '.join(empty)} holds no number at all; leave it out of target_columns")
    names = [str(name) for name in table[columns.name]] if columns.name else [""] * len(table)
    place, times = f"{where}: {columns.time}", None
    if columns.time:
        times = read_times(
            table[columns.time], place, time_format=columns.time_format, groups=names, known=columns.known
        )
    series = _by_name(names, values, None if times is None else times.stamps)
    if times is not None:
        series = [replace(one, time_format=times.format) for one in series]
        if times.note:
            notes.append(f"{place}: {times.note}; {_span(series)}")
        _check_repeated(series, place, has_names=columns.name is not None)
    return series, notes + [f"{where}: {note}" for one in series for note in irregularities(one)]


def _span(series: Sequence[Series]) -> str:
    """First and last time, and the step of the longest series."""
    times = [one.times for one in series if one.times is not None]
    step = step_in_words(usual_step(max(times, key=len)))
    return f"{min(one[0] for one in times)} to {max(one[-1] for one in times)}, a step is {step}"


def _check_repeated(series: Sequence[Series], place: str, *, has_names: bool) -> None:
    """Raise UserError where most stamps stand in several rows: several series were taken for one."""
    for one in series:
        assert one.times is not None, "called for series with time stamps"
        repeated = one.times[one.times.duplicated()]
        if len(repeated) * 2 >= len(one) > 2:
            name = f" of {one.name}" if one.name else ""
            remedy = "correct them" if has_names else "id_column names the column that keeps several series apart"
            raise UserError(
                f"{place}: {len(repeated):,} of {len(one):,} time stamps{name} are repeated (first: {repeated[0]}); "
                f"{remedy}, or time_column=none reads the rows in their order"
            )


def _numbers(cells: Iterable[object]) -> np.ndarray:
    numbers = pd.to_numeric(pd.Series(list(cells), dtype=object), errors="coerce").to_numpy(np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _gaps(table: Dataset, columns: Sequence[str], values: np.ndarray) -> str:
    """How many values are missing, and what the first such cells hold."""
    places = np.argwhere(np.isnan(values))
    if not len(places):
        return ""
    found = []
    for row, column in places[:SHOWN].tolist():
        cell = table[row][columns[column]]
        is_empty = cell is None or str(cell).strip().lower() in MISSING_WORDS
        found.append(f"{columns[column]} of row {row + 1} {'is missing' if is_empty else f'holds {cell!r}'}")
    more = ", ..." if len(places) > len(found) else ""
    return f"{len(places):,} of {values.size:,} values are no numbers ({', '.join(found)}{more})"


def _by_name(names: Sequence[str], values: np.ndarray, times: pd.DatetimeIndex | None) -> list[Series]:
    series = []
    for name, places in pd.Series(names).groupby(np.asarray(names, dtype=object), sort=False).indices.items():
        rows = np.asarray(places)
        if times is not None and not _goes_back_an_hour(times[rows]):
            rows = rows[np.argsort(times[rows], kind="stable")]
        series.append(Series(str(name), values[rows], None if times is None else times[rows]))
    return series


def _goes_back_an_hour(times: pd.DatetimeIndex) -> bool:
    """Whether rows are in order of time but for the clock that goes back in autumn, less than an hour in the stamps.

    Sorting would mix up the hour before and the hour after.
    """
    steps = times[1:] - times[:-1]
    back = steps[steps < NO_TIME]
    return 0 < len(back) <= times.year.nunique() and bool((back > -HOUR).all()) and times.has_duplicates


# ------------------------------------------------------------------------------------------------ time


def irregularities(series: Series) -> list[str]:
    """Irregularities of the time stamps, in words."""
    times, name = series.times, f" of {series.name}" if series.name else ""
    if times is None or len(times) < 2 or regular_step(times):
        return []
    lengths = pd.Series(times[1:] - times[:-1])
    usual = lengths[lengths > NO_TIME].mode()
    repeated, odd = times[times.duplicated()], lengths[(lengths != NO_TIME) & ~lengths.isin(usual[:1])]
    notes = []
    if len(repeated):
        notes.append(f"{len(repeated):,} time stamps{name} are repeated (first: {_some(repeated)})")
    if len(odd):
        notes.append(
            f"{len(odd):,} of {len(lengths):,} steps{name} are not {usual[0]} long (first: after "
            f"{_some(times[odd.index])}); windows count rows, not time"
        )
    has_zone = series.time_format is not None and series.time_format.zone is not None
    if not has_zone and len(repeated) and usual[0] <= HOUR and repeated.month.isin((4, 9, 10, 11)).all():
        if repeated.hour.isin((0, 1, 2, 3)).all():
            notes.append(
                f"the repeated time stamps{name} look like local time whose clock goes back in autumn (daylight "
                "saving): kept in the order of the rows; stamps in UTC or with an offset leave no doubt"
            )
    return notes


def _some(times: pd.DatetimeIndex) -> str:
    return ", ".join(map(str, times[:SHOWN])) + (", ..." if len(times) > SHOWN else "")


def usual_season(times: pd.DatetimeIndex | None) -> int:
    """Steps per day; per week if a step is a day, per year if it is a month; else 1."""
    if times is None:
        return 1
    length = (times[0] + usual_step(times) * 12 - times[0]) / 12
    if length < DAY:
        return round(DAY / length)
    return 7 if length < 1.5 * DAY else 12 if 27 * DAY < length < 32 * DAY else 1


def calendar_features(times: pd.DatetimeIndex, names: Sequence[str]) -> np.ndarray:
    """Sine and cosine of where each time stamp is in the cycles `names`: (steps, 2 x names) float32."""
    angles = [2 * np.pi * np.asarray(CALENDAR[name](times), dtype=np.float64) for name in names]
    return np.stack([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


# ------------------------------------------------------------------------------------------------ parts


def bounds(num_steps: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """First and last step (exclusive) of consecutive parts, given as `shares` of the series or as numbers of rows."""
    exact = np.cumsum(shares) if max(shares) > 1 else np.cumsum(shares) * num_steps
    ends = [int(round(end, 6)) for end in exact.tolist()]  # rounded first: 0.7 + 0.1 + 0.2 is a little less than 1
    return list(zip([0, *ends[:-1]], ends, strict=True))


def scaling_of(
    ranges: Sequence[tuple[Series, int, int]], season: int, columns: Sequence[str]
) -> dict[str, list[float]]:
    """Mean, standard deviation (1 if constant) and mean absolute error of the seasonal naive forecast, by column.

    Of the observed values in all (series, first, last).  The error is the scale of MASE (Hyndman & Koehler 2006); 0:
    unknown.

    Raises: UserError for a column without numbers, or no row at all.
    """
    parts = [series.values[first:last] for series, first, last in ranges]
    values = np.concatenate(parts)
    if not len(values):
        raise UserError("the train rows: 0 rows are too few; give this part more rows (split_rows), or a longer table")
    if empty := [name for name, column in zip(columns, values.T, strict=True) if np.isnan(column).all()]:
        raise UserError(f"no training row has a number in {', '.join(empty)}; leave it out of target_columns")
    errors = np.concatenate([np.abs(part[season:] - part[:-season]) for part in parts])
    std = np.nanstd(values, axis=0)
    return {
        "mean": np.nanmean(values, axis=0).tolist(),
        "std": np.where(std > 0, std, 1.0).tolist(),
        "seasonal_error": (np.nansum(errors, axis=0) / np.maximum((~np.isnan(errors)).sum(0), 1)).tolist(),
    }


def constant_columns(ranges: Sequence[tuple[Series, int, int]], columns: Sequence[str]) -> list[str]:
    """The columns whose observed values in all (series, first, last) are the same."""
    values = np.concatenate([series.values[first:last] for series, first, last in ranges])
    lows, highs = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return [name for name, low, high in zip(columns, lows, highs, strict=True) if low == high]


def shared_steps(one: Sequence[tuple[Series, int, int]], others: Sequence[tuple[Series, int, int]]) -> list[str]:
    """The steps in both, with equal name, time and values; none without time stamps, which identify a step."""
    seen = {step for part in others for step in _steps(*part)}
    return [f"{name} {time}".strip() for part in one for name, time, row in _steps(*part) if (name, time, row) in seen]


def _steps(series: Series, first: int, last: int) -> Iterator[tuple[str, pd.Timestamp, bytes]]:
    if series.times is not None:
        for time, row in zip(series.times[first:last], series.values[first:last], strict=True):
            yield series.name, time, row.tobytes()
