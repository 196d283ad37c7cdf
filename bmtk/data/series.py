"""Numbers over time: series read from tables, and what follows from their time stamps.  C columns."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from datasets import Dataset

from bmtk.errors import UserError

MISSING_WORDS = {"", "nan", "na", "n/a", "null", "none", "-"}
GAPS_SHOWN = 3
DAY, NO_TIME = pd.Timedelta(days=1), pd.Timedelta(0)

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


def read_series(
    table: Dataset,
    columns: Sequence[str],
    *,
    time_column: str | None,
    id_column: str | None,
    may_have_gaps: bool,
    where: str,
) -> tuple[list[Series], list[str]]:
    """A series for each name in `id_column` (one, if there is none), in order of time; and what is odd, in words.

    Raises: UserError for an invalid time stamp, for a column without numbers, and for gaps unless there may be
    any.
    """
    values, notes = np.stack([_numbers(table[name]) for name in columns], axis=1), []
    if gaps := _gaps(table, columns, values):
        notes.append(f"{where}: {gaps}")
        if not may_have_gaps:
            raise UserError(
                f"{notes[0]}.  missing_values=fill reads the value before a gap, missing_values=mask tells the model"
            )
        if empty := [name for name, column in zip(columns, values.T, strict=True) if np.isnan(column).all()]:
            raise UserError(f"{where}: {', '.join(empty)} holds no number at all; leave it out of target_columns")
    times = _times(table[time_column], f"{where}: {time_column}") if time_column else None
    series = _by_name(table[id_column] if id_column else None, times, values)
    return series, notes + [f"{where}: {note}" for one in series for note in irregularities(one)]


def _numbers(cells: Iterable[object]) -> np.ndarray:
    numbers = pd.to_numeric(pd.Series(list(cells), dtype=object), errors="coerce").to_numpy(np.float64)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _gaps(table: Dataset, columns: Sequence[str], values: np.ndarray) -> str:
    """How many values are missing, and what the first such cells hold."""
    places = np.argwhere(np.isnan(values))
    if not len(places):
        return ""
    found = []
    for row, column in places[:GAPS_SHOWN].tolist():
        cell = table[row][columns[column]]
        is_empty = cell is None or str(cell).strip().lower() in MISSING_WORDS
        found.append(f"{columns[column]} of row {row + 1} {'is missing' if is_empty else f'holds {cell!r}'}")
    more = ", ..." if len(places) > len(found) else ""
    return f"{len(places):,} of {values.size:,} values are no numbers ({', '.join(found)}{more})"


def _times(values: Iterable[object], column: str) -> pd.DatetimeIndex:
    cells = pd.Series(list(values), dtype=object)
    stamps = pd.to_datetime(cells, errors="coerce", utc=True)
    wrong = np.flatnonzero(stamps.isna())
    if len(wrong):
        raise UserError(
            f"{column} of row {wrong[0] + 1} holds {cells[wrong[0]]!r}, no time stamp such as 2024-01-31 18:00:00 "
            f"({len(wrong):,} of {len(stamps):,} rows); time_column=none reads the rows in their order"
        )
    return pd.DatetimeIndex(stamps).tz_localize(None)


def _by_name(ids: Iterable[object] | None, times: pd.DatetimeIndex | None, values: np.ndarray) -> list[Series]:
    names = np.array([""] * len(values) if ids is None else [str(name) for name in ids])
    series = []
    for name in dict.fromkeys(names.tolist()):
        rows = np.flatnonzero(names == name)
        if times is not None:
            rows = rows[np.argsort(times[rows], kind="stable")]
        series.append(Series(name, values[rows], None if times is None else times[rows]))
    return series


# ------------------------------------------------------------------------------------------------ time


def regular_step(times: pd.DatetimeIndex) -> pd.DateOffset | None:
    """The step between any two time stamps: a length, or a number of months (on one day of the month, or its last)."""
    lengths = (times[1:] - times[:-1]).unique()
    if len(lengths) == 1 and lengths[0] > NO_TIME:
        return pd.tseries.frequencies.to_offset(lengths[0])
    months = np.unique(np.diff(times.year * 12 + times.month))
    if len(months) != 1 or months[0] < 1:
        return None
    if times.is_month_end.all():
        return pd.offsets.MonthEnd(int(months[0]))
    return pd.DateOffset(months=int(months[0])) if times.day.nunique() == 1 else None


def usual_step(times: pd.DatetimeIndex) -> pd.DateOffset:
    """The step between time stamps, or the most common one; a day if there is none."""
    lengths = pd.Series(times[1:] - times[:-1])
    lengths = lengths[lengths > NO_TIME]
    return regular_step(times) or pd.tseries.frequencies.to_offset(lengths.mode()[0] if len(lengths) else DAY)


def irregularities(series: Series) -> list[str]:
    """Irregularities of the time stamps, in words."""
    times, name = series.times, f" of {series.name}" if series.name else ""
    if times is None or len(times) < 2 or regular_step(times):
        return []
    lengths = pd.Series(times[1:] - times[:-1])
    repeated, forward = times[1:][lengths == NO_TIME], lengths[lengths > NO_TIME]
    notes = [f"{len(repeated):,} time stamps{name} are repeated (first: {repeated[0]})"] if len(repeated) else []
    odd = forward[forward != forward.mode()[0]] if len(forward) else forward
    if len(odd):
        notes.append(
            f"{len(odd):,} of {len(lengths):,} steps{name} are not {forward.mode()[0]} long (first: after "
            f"{times[odd.index[0]]}); windows count rows, not time"
        )
    return notes


def times_after(times: pd.DatetimeIndex, steps: int) -> pd.DatetimeIndex:
    """The next `steps` time stamps."""
    step = usual_step(times)
    return pd.DatetimeIndex([times[-1] + step * (i + 1) for i in range(steps)])


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

    Raises: UserError for a column without numbers.
    """
    parts = [series.values[first:last] for series, first, last in ranges]
    values = np.concatenate(parts)
    if empty := [name for name, column in zip(columns, values.T, strict=True) if np.isnan(column).all()]:
        raise UserError(f"no training row has a number in {', '.join(empty)}; leave it out of target_columns")
    errors = np.concatenate([np.abs(part[season:] - part[:-season]) for part in parts])
    std = np.nanstd(values, axis=0)
    return {
        "mean": np.nanmean(values, axis=0).tolist(),
        "std": np.where(std > 0, std, 1.0).tolist(),
        "seasonal_error": (np.nansum(errors, axis=0) / np.maximum((~np.isnan(errors)).sum(0), 1)).tolist(),
    }


def shared_steps(one: Sequence[tuple[Series, int, int]], others: Sequence[tuple[Series, int, int]]) -> list[str]:
    """The steps in both, with equal name, time and values; none without time stamps, which identify a step."""
    seen = {step for part in others for step in _steps(*part)}
    return [f"{name} {time}".strip() for part in one for name, time, row in _steps(*part) if (name, time, row) in seen]


def _steps(series: Series, first: int, last: int) -> Iterator[tuple[str, pd.Timestamp, bytes]]:
    if series.times is not None:
        for time, row in zip(series.times[first:last], series.values[first:last], strict=True):
            yield series.name, time, row.tobytes()
