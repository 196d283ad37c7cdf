"""The time stamps of a column: how they are written is decided over all of its cells.

Stamps are kept without an offset, on one clock: the column's own if all of its stamps have one offset or none, UTC if
their offsets differ.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from bmtk.errors import UserError

from .time_formats import EXCEL_DAYS, EXCEL_EPOCH, MONTHS, ORDERS, UNITS, TimeFormat, zone_text
from .time_steps import regular_step

YEARS = (1700, 2250)  # beyond these a number or a text is something else than a time
MISSING_WORDS = {"", "nan", "nat", "na", "n/a", "null", "none", "-"}

UNIX_RANGE = (10**8, 7_260_000_000)  # seconds; Unix times of 1973 to 2200 tell their own unit
DIGITS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
REMEDY = (
    "time_format (day_first, month_first, unix_seconds, or a pattern such as '%d.%m.%Y %H:%M') names how they are "
    "written; time_column=none reads the rows in their order"
)
_NAME, _WEEKDAY, _YEAR = r"(?P<name>[A-Za-z]{3,9})", r"(?:(?P<weekday>[A-Za-z]{3,9})\.?,?\s+)?", r"(?P<year>\d{4})"
_CLOCK = (
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?)?"
    r"(?:\s*(?P<half>[AaPp]\.?[Mm]\.?))?"
)
_ZONE = r"(?:\s*(?P<zone>[Zz]|UTC|GMT|[+-]\d{2}(?::?\d{2})?))?"
_TIME = rf"(?:(?:T|,?\s+){_CLOCK}{_ZONE})?"
# The ways to write a date that are known; a cell is written in the first that fits.
WAYS = {
    "year-month-day": rf"(?P<a>\d{{4}})(?P<s>[-/. ])(?P<b>\d{{1,2}})(?P=s)(?P<c>\d{{1,2}}){_TIME}",
    "three numbers": rf"(?P<a>\d{{1,2}})(?P<s>[-/. ])(?P<b>\d{{1,2}})(?P=s)(?P<c>\d{{4}}|\d{{2}}){_TIME}",
    "年月日": rf"{_YEAR}年(?P<month>\d{{1,2}})月(?P<day>\d{{1,2}})日{_TIME}",
    "digits": rf"{_YEAR}(?P<month>\d{{2}})(?P<day>\d{{2}}){_TIME}",
    "digits of the time, too": rf"{_YEAR}(?P<month>\d{{2}})(?P<day>\d{{2}})[T ](?P<hour>\d{{2}})(?P<minute>\d{{2}})"
    rf"(?P<second>\d{{2}})?{_ZONE}",
    "day, name of the month, year": rf"{_WEEKDAY}(?P<day>\d{{1,2}})[-\s./]*{_NAME}\.?,?[-\s./]*"
    rf"(?P<year>\d{{4}}|\d{{2}}){_TIME}",
    "name of the month, day, year": rf"{_WEEKDAY}{_NAME}\.?\s+(?P<day>\d{{1,2}}),?\s+{_YEAR}{_TIME}",
    "year and month": rf"{_YEAR}[-/.M年](?P<month>\d{{1,2}})月?",
    "month and year": rf"(?P<month>\d{{1,2}})[-/.]{_YEAR}",
    "name of the month, year": rf"{_NAME}[-\s.,/]*{_YEAR}",
    "year, name of the month": rf"{_YEAR}[-\s]{_NAME}",
    "year and quarter": rf"{_YEAR}[-\s]?Q(?P<quarter>[1-4])",
    "quarter and year": rf"Q(?P<quarter>[1-4])[-/\s]?{_YEAR}",
}


@dataclass(frozen=True)
class Times:
    """The time stamps of a column, how they are written, and what was decided about that, in words."""

    stamps: pd.DatetimeIndex
    format: TimeFormat
    note: str = ""


def read_times(
    cells: Iterable[object],
    column: str,
    *,
    time_format: str | None = None,
    groups: Sequence[str] = (),
    known: Mapping[str, Any] | None = None,
) -> Times:
    """The time stamps of a column.  `column` names it in errors; `groups` has the series of each row.

    `known` is what a model was trained on, "time_format" and "utc_offset" (minutes): it settles what cells of a
    short table leave open, and on which clock stamps are kept.
    Raises: UserError for a cell that is no time stamp, and where several readings are possible.
    """
    values = pd.Series(list(cells), dtype=object)
    known = known or {}
    texts = values.map(lambda cell: "" if cell is None else str(cell).strip())
    are_numbers = not values.map(lambda cell: isinstance(cell, str)).any()
    missing = np.flatnonzero(values.isna() | texts.str.lower().isin(MISSING_WORDS))
    if len(missing):
        raise UserError(
            f"{column} of row {missing[0] + 1} is empty ({len(missing):,} of {len(values):,} rows are): give each row "
            "its time stamp, or leave such rows out; time_column=none reads the rows in their order"
        )
    kinds = {_kind(cell) for cell in values}
    if len(kinds) > 1:
        first = {_kind(cell): row for row, cell in reversed(list(enumerate(values)))}
        shown = " and ".join(f"row {row + 1} {values[row]!r}" for row in sorted(first.values())[:2])
        raise UserError(f"{column} is written in several ways: {shown}; write all time stamps alike.  {REMEDY}")
    (kind,) = kinds
    if time_format and "%" in time_format:
        return _by_pattern(values if kind == "date" else texts, column, time_format)
    if kind == "date":
        return _of_objects(values, known)
    if kind == "number":
        found = _of_numbers(texts, column, time_format, known)
        styles = (("number", "yes"),) if are_numbers else ()
        return replace(found, format=replace(found.format, styles=styles))
    return _of_texts(texts, column, time_format, groups, known)


def _kind(cell: object) -> str:
    if isinstance(cell, datetime.date | np.datetime64):
        return "date"
    return "number" if re.fullmatch(r"[+-]?\d+(\.\d+)?(e\+?\d+)?", str(cell).strip()) else "text"


# ------------------------------------------------------------------------------------------------ kinds of cells


def _by_pattern(values: pd.Series, column: str, pattern: str) -> Times:
    has_zone = "%z" in pattern
    stamps = pd.to_datetime(values, format=pattern, errors="coerce", utc=has_zone)
    wrong = np.flatnonzero(stamps.isna())
    if len(wrong):
        raise UserError(
            f"time_format={pattern!r}: {column} of row {wrong[0] + 1} holds {values[wrong[0]]!r} ({len(wrong):,} of "
            f"{len(values):,} rows do not fit)"
        )
    stamps = pd.DatetimeIndex(stamps).tz_localize(None).as_unit("us")
    return Times(stamps, TimeFormat(pattern, datetime.timezone.utc if has_zone else None))


def _of_objects(values: pd.Series, known: Mapping[str, Any]) -> Times:
    """Of what Parquet and Arrow hold: dates, and times with or without a zone."""
    if all(type(value) is datetime.date for value in values):
        return Times(pd.DatetimeIndex(pd.to_datetime(values)).as_unit("us"), TimeFormat("date"))
    offsets = [value.utcoffset() if isinstance(value, datetime.datetime) else None for value in values]
    if all(offset is None for offset in offsets):
        return Times(pd.DatetimeIndex(pd.to_datetime(values)).as_unit("us"), TimeFormat("datetime"))
    minutes = np.array([(offset or datetime.timedelta()).total_seconds() / 60 for offset in offsets])
    utc = pd.DatetimeIndex(pd.to_datetime(values, utc=True)).tz_localize(None).as_unit("us")
    return _on_a_clock(utc, minutes, TimeFormat("datetime", values.iloc[-1].tzinfo), known)


def _on_a_clock(utc: pd.DatetimeIndex, offsets: np.ndarray, found: TimeFormat, known: Mapping[str, Any]) -> Times:
    """Stamps in UTC and the offset of each (minutes), on the clock of the column."""
    is_one = bool((offsets == offsets[0]).all())
    clock = known.get("utc_offset")
    clock = int(offsets[0]) if clock is None and is_one else clock or 0
    zone = zone_text(pd.Timestamp(0, tz=datetime.timezone(datetime.timedelta(minutes=float(offsets[-1])))), "+00:00")
    note = f"offset from UTC {zone}" if is_one else f"offsets from UTC differ: steps are counted in UTC, last {zone}"
    return Times(utc + pd.Timedelta(minutes=clock), replace(found, clock=clock), note)


def _of_numbers(texts: pd.Series, column: str, time_format: str | None, known: Mapping[str, Any]) -> Times:
    """Unix times, or the digits of a date; which of them, the numbers themselves show."""
    whole = texts.str.replace(r"\.0+$", "", regex=True)
    numbers = pd.to_numeric(texts)
    if time_format in UNITS or time_format == EXCEL_DAYS:
        return _counted(whole, numbers, str(time_format), column)
    lengths = whole.str.len().unique()
    pattern = DIGITS.get(int(lengths[0])) if len(lengths) == 1 else None
    if pattern and whole.str.isdigit().all():
        stamps = pd.to_datetime(whole, format=pattern, errors="coerce")
        if stamps.notna().all() and stamps.dt.year.between(*YEARS).all():
            found = TimeFormat(pattern)
            example = f"{whole.iloc[0]} is {stamps.iloc[0]}"
            return Times(pd.DatetimeIndex(stamps).as_unit("us"), found, f"numbers read as {pattern} ({example})")
    largest = float(np.abs(numbers).max())
    for name, unit in UNITS.items():
        if UNIX_RANGE[0] * unit <= largest <= UNIX_RANGE[1] * unit:
            return _counted(whole, numbers, name, column)
    if known.get("time_format") in (*UNITS, EXCEL_DAYS):
        return _counted(whole, numbers, known["time_format"], column)
    asked = f"time_format={time_format}: " if time_format else ""
    raise UserError(
        f"{asked}{column} holds numbers ({whole.iloc[0]}, ..., {whole.iloc[-1]}) that are neither Unix times nor "
        f"dates such as 20240131 or 2024; {REMEDY}"
    )


def _counted(whole: pd.Series, numbers: pd.Series, name: str, column: str) -> Times:
    """Times that are counted from an epoch."""
    if name == EXCEL_DAYS:
        micros, epoch = np.rint(numbers.to_numpy(np.float64) * 86_400_000) * 1000, EXCEL_EPOCH
    else:
        epoch, unit = np.datetime64(0, "us"), UNITS[name]
        is_whole = whole.str.fullmatch(r"[+-]?\d+").all()
        if is_whole:  # not by way of float64, which rounds nanoseconds
            exact = [int(text) * 10**6 // unit for text in whole]
        else:
            exact = [round(float(text) / unit * 1e6) for text in whole]
        micros = np.array(exact, dtype=np.float64 if max(map(abs, exact)) > 2**62 else np.int64)
    years = micros / (365.25 * 86400e6) + epoch.astype("datetime64[Y]").astype(int) + 1970
    if not ((years > YEARS[0]) & (years < YEARS[1])).all():
        raise UserError(
            f"{column}: time_format={name} makes {whole.iloc[0]} a time of the year {years[0]:.0f}; {REMEDY}"
        )
    stamps = pd.DatetimeIndex(epoch + micros.astype("timedelta64[us]"))
    words = name.replace("_", " ").capitalize()
    return Times(stamps, TimeFormat(name), f"{words} ({whole.iloc[0]} is {stamps[0]})")


# ------------------------------------------------------------------------------------------------ texts


def _of_texts(
    texts: pd.Series, column: str, time_format: str | None, groups: Sequence[str], known: Mapping[str, Any]
) -> Times:
    way, parts = _parts_of(texts, column)
    order, dates, reason = _dates(parts, texts, column, (time_format, known.get("time_format")), groups)
    stamps = pd.DatetimeIndex(dates + _time_of_day(parts, texts, column)).as_unit("us")
    fullest = len(texts) - 1 - int(parts.notna().sum(axis=1).to_numpy()[::-1].argmax())
    template, styles = _template(way, texts.iloc[fullest], parts, order)
    notes = [reason] if reason else []
    if "hour" in parts and 0 < (without := int(parts["hour"].isna().sum())) < len(parts):
        notes.append(f"{without:,} of {len(parts):,} have no time of day: read as midnight")
    found = TimeFormat(order, template=template, styles=styles)
    if "zone" not in parts or parts["zone"].isna().all():
        return Times(stamps, found, "; ".join(notes))
    without_zone = np.flatnonzero(parts["zone"].isna())
    if len(without_zone):
        row = without_zone[0]
        raise UserError(
            f"{column} of row {row + 1}, {texts.iloc[row]!r}, has no offset from UTC, and other rows have one; write "
            "all time stamps alike"
        )
    offsets = parts["zone"].map({zone: _minutes(zone) for zone in parts["zone"].unique()}).to_numpy(np.float64)
    zone = datetime.timezone(datetime.timedelta(minutes=float(offsets[-1])))
    utc = stamps - pd.to_timedelta(offsets, unit="min")
    placed = _on_a_clock(utc, offsets, TimeFormat(order, zone, 0, template, styles), known)
    return Times(placed.stamps, placed.format, "; ".join([*notes, placed.note]))


def _parts_of(texts: pd.Series, column: str) -> tuple[str, pd.DataFrame]:
    """The way in which all cells are written, and the parts of each."""
    way = next((way for way, pattern in WAYS.items() if re.fullmatch(pattern, texts.iloc[0])), None)
    if way is None:
        raise UserError(
            f"{column} of row 1 holds {texts.iloc[0]!r}, no time stamp such as 2024-01-31 18:00:00; {REMEDY}"
        )
    parts = texts.str.extract(f"^(?:{WAYS[way]})$")
    others = np.flatnonzero(parts.isna().all(axis=1))
    if len(others):
        cell, count = texts.iloc[others[0]], f"({len(others):,} of {len(texts):,} rows)"
        if any(re.fullmatch(pattern, cell) for pattern in WAYS.values()):
            reason = f"written otherwise than {texts.iloc[0]!r} of row 1 {count}; write all time stamps alike.  "
        else:
            reason = f"no time stamp such as 2024-01-31 18:00:00 {count}; "
        raise UserError(f"{column} of row {others[0] + 1} holds {cell!r}, {reason}{REMEDY}")
    return way, parts.dropna(axis=1, how="all")


def _dates(
    parts: pd.DataFrame,
    texts: pd.Series,
    column: str,
    wanted: tuple[str | None, str | None],
    groups: Sequence[str],
) -> tuple[str, pd.Series, str]:
    """Format, dates, and how it was decided.  `wanted` is what was asked for, and what a model was trained on."""
    if "a" not in parts:
        dates = _calendar(*(_numbers_of(parts, name) for name in ("year", "month", "day")))
        _check_dates(dates, texts, column)
        return "year_first" if parts.columns[0] == "year" else "names", dates, ""
    lengths = set(parts["c"].str.len())
    orders = ["year_first"] if parts["a"].str.len().eq(4).all() else ["day_first", "month_first"]
    if "year_first" not in orders and lengths == {2}:
        orders.append("year_first")
    asked, trained = wanted
    if asked in ORDERS:
        if asked not in orders:
            raise UserError(f"time_format={asked}, and {column} of row 1 holds {texts.iloc[0]!r}; {REMEDY}")
        orders = [asked]
    read = {order: _in_order(parts, order) for order in orders}
    possible = [order for order, dates in read.items() if dates.notna().all()]
    if not possible:
        _refuse_mixture(read, texts, column)
    order, reason = _decided(read, possible, texts, column, trained, groups)
    shown = f"read {order.replace('_', ' ')} ({texts.iloc[-1]} is {read[order].iloc[-1].date()}"
    return order, read[order], "" if orders == ["year_first"] else f"{shown}; {reason})"


def _decided(
    read: Mapping[str, pd.Series],
    possible: list[str],
    texts: pd.Series,
    column: str,
    trained: str | None,
    groups: Sequence[str],
) -> tuple[str, str]:
    """One of the possible orders, and the reason.  Raises: UserError if nothing decides."""
    if len(read) == 1:
        return possible[0], "as time_format says"
    if len(possible) == 1:
        rows = [np.flatnonzero(dates.isna()) for order, dates in read.items() if order not in possible]
        return possible[0], f"row {max(row[0] for row in rows) + 1} holds {texts.iloc[max(row[0] for row in rows)]}"
    if trained in possible:
        return str(trained), "as the model was trained"
    regular = [order for order in possible if _are_regular(read[order], groups)]
    if len(regular) == 1:
        return regular[0], "so all steps are equal"
    if texts.str.contains(".", regex=False).all() and "day_first" in possible:
        return "day_first", "as dates with points are"
    one, other = (read[order] for order in possible[:2])
    row = int((one != other).to_numpy().argmax())
    raise UserError(
        f"{column} of row {row + 1} holds {texts.iloc[row]!r}, which may be {one.iloc[row].date()} or "
        f"{other.iloc[row].date()}, and no row decides: set time_format={' or time_format='.join(possible)}"
    )


def _refuse_mixture(read: Mapping[str, pd.Series], texts: pd.Series, column: str) -> None:
    """Raise UserError for a column that has no reading in which all cells are dates."""
    none = np.flatnonzero(np.all([dates.isna() for dates in read.values()], axis=0))
    if len(none) or len(read) == 1:
        row = none[0]
        order = next(iter(read)).replace("_", " ")
        read_so = f" {order}" if len(read) == 1 and order != "year first" else ""
        raise UserError(f"{column} of row {row + 1} holds {texts.iloc[row]!r}, which is no date{read_so}; correct it")
    day, month = (np.flatnonzero(read[order].isna())[0] for order in ("month_first", "day_first"))
    raise UserError(
        f"{column} is written in several ways: {texts.iloc[day]!r} of row {day + 1} has the day first, "
        f"{texts.iloc[month]!r} of row {month + 1} the month (a spreadsheet may have turned some of them); write all "
        "time stamps alike"
    )


def _are_regular(dates: pd.Series, groups: Sequence[str]) -> bool:
    """Whether each series has equal steps, two at least."""
    names = np.asarray(groups if len(groups) else [""] * len(dates))
    for name in np.unique(names):
        stamps = pd.DatetimeIndex(dates[names == name]).sort_values()
        if len(stamps) < 3 or regular_step(stamps) is None:
            return False
    return True


def _in_order(parts: pd.DataFrame, order: str) -> pd.Series:
    year, month, day = (pd.to_numeric(parts[place]) for place in ORDERS[order])
    return _calendar(_full_year(year, parts[ORDERS[order][0]]), month, day)


def _full_year(year: pd.Series, texts: pd.Series) -> pd.Series:
    """Years of two digits are those of 1969 to 2068, as strptime reads them."""
    return year + np.where(texts.str.len() > 2, 0, np.where(year < 69, 2000, 1900))


def _numbers_of(parts: pd.DataFrame, name: str) -> pd.Series:
    """The years, months or days; January and the first where there are none."""
    if name == "month" and "name" in parts:
        short = parts["name"].str.lower()
        known = {form: number for number, month in enumerate(MONTHS, 1) for form in (month.lower(), month[:3].lower())}
        return short.map({**known, "sept": 9}).astype(float)
    if name == "month" and "quarter" in parts:
        return pd.to_numeric(parts["quarter"]) * 3 - 2
    if name not in parts:
        return pd.Series(1, index=parts.index)
    numbers = pd.to_numeric(parts[name])
    return _full_year(numbers, parts[name]) if name == "year" else numbers


def _calendar(year: pd.Series, month: pd.Series, day: pd.Series) -> pd.Series:
    dates = pd.to_datetime({"year": year, "month": month, "day": day}, errors="coerce")
    return dates.where(year.between(*YEARS))


def _check_dates(dates: pd.Series, texts: pd.Series, column: str) -> None:
    wrong = np.flatnonzero(dates.isna())
    if len(wrong):
        raise UserError(f"{column} of row {wrong[0] + 1} holds {texts.iloc[wrong[0]]!r}, which is no date; {REMEDY}")


def _time_of_day(parts: pd.DataFrame, texts: pd.Series, column: str) -> pd.Series:
    """Lengths of time since midnight; 24:00 is the next midnight."""
    hour, minute, second = (
        pd.to_numeric(parts[name]).fillna(0) if name in parts else pd.Series(0, index=parts.index)
        for name in ("hour", "minute", "second")
    )
    fraction = parts["fraction"].fillna("0") if "fraction" in parts else pd.Series("0", index=parts.index)
    wrong = (hour > 24) | (minute > 59) | (second > 60) | ((hour == 24) & (minute + second > 0))
    if "half" in parts:
        is_half, is_pm = parts["half"].notna(), parts["half"].str.lower().str.startswith("p", na=False)
        wrong |= is_half & ((hour < 1) | (hour > 12))
        hour = hour.where(~is_half, hour % 12 + 12 * is_pm)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(f"{column} of row {row + 1} holds {texts.iloc[row]!r}, which is no time of day; correct it")
    micros = pd.to_numeric(fraction.str.pad(9, side="right", fillchar="0")) // 1000
    seconds = (hour * 3600 + minute * 60 + second).astype("int64")
    return pd.to_timedelta(seconds * 10**6 + micros, unit="us")


def _minutes(zone: str) -> int:
    """The offset from UTC of such as Z, +02:00, +0200 or +02."""
    if zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "")
    return (-1 if zone[0] == "-" else 1) * (int(digits[:2]) * 60 + int(digits[2:] or 0))


def _template(way: str, cell: str, parts: pd.DataFrame, order: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """How others are written as `cell` is: numbers are padded unless some cell of the column has a shorter one."""
    found = re.fullmatch(WAYS[way], cell)
    assert found, "a cell of this way"
    meanings = dict(zip(ORDERS.get(order, ""), ("year", "month", "day"), strict=False))
    spans = {name: found.span(name) for name, value in found.groupdict().items() if value and name != "s"}
    styles, pieces, end = [], [], 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        part, shortest = meanings.get(name, name), int(parts[name].str.len().min())
        if part == "year":
            place = "{year:04}" if stop - start > 2 else "{short_year:02}"
        elif part in ("month", "day", "hour", "minute", "second"):
            place = f"{{{part}:0{shortest}}}"
        else:
            place = f"{{{part}}}"
            styles.append((part, cell[start:stop]))
        pieces += [cell[end:start].replace("{", "{{").replace("}", "}}"), place]
        end = stop
    return "".join([*pieces, cell[end:]]), tuple(styles)
