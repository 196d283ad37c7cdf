"""How the time stamps of a column are written, so that others are written alike."""

import datetime
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bmtk.errors import UserError

from .time_steps import DAY

# The time formats that have a name.  Unix times count from 1970.
ORDERS = {"year_first": "abc", "day_first": "cba", "month_first": "cab"}  # which of three numbers is year, month, day
UNITS = {"unix_seconds": 1, "unix_milliseconds": 10**3, "unix_microseconds": 10**6, "unix_nanoseconds": 10**9}
EXCEL_DAYS, EXCEL_EPOCH = "excel_days", np.datetime64("1899-12-30", "us")
NAMED_FORMATS = (*ORDERS, *UNITS, EXCEL_DAYS)
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@dataclass(frozen=True)
class TimeFormat:
    """How the stamps of a column are written, and so how those after them are.

    `name` is one of NAMED_FORMATS, a pattern of strptime, the kind of objects, or a way of WAYS.  `zone` is that of
    the last stamp, None without offsets; `clock` is the offset at which stamps are kept, in minutes.
    """

    name: str
    zone: datetime.tzinfo | None = None
    clock: int = 0
    template: str = ""  # of a text in one of WAYS: str.format's, over the parts of a time
    styles: tuple[tuple[str, str], ...] = ()  # part -> how the last cell writes it

    def written(self, stamp: pd.Timestamp) -> str | int:
        """A stamp of this clock as the column would hold it."""
        if self.zone is not None:
            utc = (stamp - pd.Timedelta(minutes=self.clock)).tz_localize("UTC")
            stamp = utc.tz_convert(self.zone)
        if self.template:
            return self.template.format(**self._parts(stamp))
        if self.name in UNITS:
            return round((stamp - pd.Timestamp(0)) / pd.Timedelta(seconds=1) * UNITS[self.name])
        if self.name == EXCEL_DAYS:
            days = (stamp - pd.Timestamp(EXCEL_EPOCH)) / DAY
            return int(days) if days == int(days) else str(round(days, 9))
        if self.name == "date":
            return str(stamp.date())
        if "%" not in self.name:
            return str(stamp)
        text = stamp.strftime(self.name)
        return int(text) if dict(self.styles).get("number") else text

    def _parts(self, stamp: pd.Timestamp) -> dict[str, object]:
        style = dict(self.styles)
        is_half_day = "half" in style
        half = _like(style.get("half", ""), "am" if stamp.hour < 12 else "pm", "a.m." if stamp.hour < 12 else "p.m.")
        return {
            "year": stamp.year,
            "short_year": stamp.year % 100,
            "month": stamp.month,
            "day": stamp.day,
            "quarter": stamp.quarter,
            "hour": (stamp.hour - 1) % 12 + 1 if is_half_day else stamp.hour,
            "minute": stamp.minute,
            "second": stamp.second,
            "fraction": f"{stamp.microsecond:06}{stamp.nanosecond:03}"[: len(style.get("fraction", ""))],
            "half": half,
            "name": _like(style.get("name", ""), MONTHS[stamp.month - 1][:3], MONTHS[stamp.month - 1]),
            "weekday": _like(style.get("weekday", ""), WEEKDAYS[stamp.weekday()][:3], WEEKDAYS[stamp.weekday()]),
            "zone": zone_text(stamp, style.get("zone", "")),
        }


def _like(sample: str, short: str, long: str) -> str:
    """The short or the long word, in the case and of about the length of a sample."""
    word = short if len(sample) <= len(short) else long
    return word.upper() if sample.isupper() else word.lower() if sample.islower() else word


def zone_text(stamp: pd.Timestamp, sample: str) -> str:
    if not sample or sample[0] not in "+-":
        return sample
    minutes = round(stamp.utcoffset().total_seconds() / 60)
    hours, minutes, sign = abs(minutes) // 60, abs(minutes) % 60, "-" if minutes < 0 else "+"
    if len(sample) == 3 and not minutes:
        return f"{sign}{hours:02}"
    return f"{sign}{hours:02}{':' if ':' in sample or len(sample) == 3 else ''}{minutes:02}"


def check_time_format(value: str | None) -> None:
    """Raise UserError if `value` is neither a named format nor a pattern."""
    if value is not None and value not in NAMED_FORMATS and "%" not in value:
        raise UserError(
            f"time_format={value!r} is unknown; choose one of {', '.join(NAMED_FORMATS)}, or a pattern such as "
            "'%d.%m.%Y %H:%M'"
        )
