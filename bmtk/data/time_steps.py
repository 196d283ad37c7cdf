"""Steps between time stamps: which is regular, which the usual one, and the stamps that follow."""

import numpy as np
import pandas as pd

DAY, NO_TIME = pd.Timedelta(days=1), pd.Timedelta(0)


def regular_step(times: pd.DatetimeIndex) -> pd.DateOffset | None:
    """The step between any two time stamps: a number of months (on one day of the month, or its last), or a length."""
    months = np.unique(np.diff(times.year * 12 + times.month))
    # Months first: those of two or three stamps may have equal lengths, as July and August.
    if len(months) == 1 and months[0] > 0 and (times - times.normalize()).nunique() == 1:
        if times.is_month_end.all():
            return pd.offsets.MonthEnd(int(months[0]))
        if times.day.nunique() == 1:
            return pd.DateOffset(months=int(months[0]))
    lengths = (times[1:] - times[:-1]).unique()
    return pd.tseries.frequencies.to_offset(lengths[0]) if len(lengths) == 1 and lengths[0] > NO_TIME else None


def usual_step(times: pd.DatetimeIndex) -> pd.DateOffset:
    """The step between time stamps, or the most common one; a day if there is none."""
    lengths = pd.Series(times[1:] - times[:-1])
    lengths = lengths[lengths > NO_TIME]
    return regular_step(times) or pd.tseries.frequencies.to_offset(lengths.mode()[0] if len(lengths) else DAY)


def times_after(times: pd.DatetimeIndex, steps: int) -> pd.DatetimeIndex:
    """The next `steps` time stamps."""
    step = usual_step(times)
    return pd.DatetimeIndex([times[-1] + step * (i + 1) for i in range(steps)])


def step_in_words(step: pd.DateOffset) -> str:
    months = step.n if isinstance(step, pd.offsets.MonthEnd) else getattr(step, "months", 0)
    if months:
        return _counted(*((months // 12, "year") if months % 12 == 0 else (months, "month")))
    length = pd.Timedelta(step)
    for unit, name in ((DAY, "day"), (pd.Timedelta(hours=1), "hour"), (pd.Timedelta(minutes=1), "minute")):
        if length % unit == NO_TIME:
            return _counted(length // unit, name)
    return f"{length.total_seconds():g} seconds"


def _counted(count: int, word: str) -> str:
    return f"1 {word}" if count == 1 else f"{count} {word}s"
