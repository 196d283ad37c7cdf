"""Time stamps: how a column is written is decided over all of it, and what comes next is written in the same way."""

import datetime

import pandas as pd
import pytest

from bmtk.data.series import SeriesColumns, read_series
from bmtk.data.time_steps import regular_step, times_after
from bmtk.data.times import read_times
from bmtk.errors import UserError

HOURS = pd.date_range("2024-01-01", periods=30, freq="h")
DAYS = pd.date_range("2024-01-01", periods=400, freq="D")
MONTHS = pd.date_range("2001-01-01", periods=240, freq="MS")
BERLIN = pd.date_range("2024-10-26", periods=60, freq="h", tz="Europe/Berlin")  # 27 October: the clock goes back


@pytest.mark.parametrize(
    ("truth", "write", "following"),
    [
        (HOURS, str, "2024-01-02 06:00:00"),
        (HOURS, lambda t: f"{t:%Y-%m-%d}" if t.hour == 0 else str(t), "2024-01-02 06:00:00"),
        (HOURS, lambda t: f"{t:%Y/%m/%d %H:%M}", "2024/01/02 06:00"),
        (HOURS, lambda t: f"{t:%d-%b-%y %I:%M %p}", "02-Jan-24 06:00 AM"),
        (HOURS, lambda t: f"{t:%Y%m%dT%H%M}", "20240102T0600"),
        (HOURS, lambda t: f"{t:%Y%m%d%H}", "2024010206"),
        (HOURS, lambda t: int(t.timestamp()), 1704175200),
        (HOURS, lambda t: int(t.timestamp() * 1e3), 1704175200000),
        (HOURS, lambda t: int(t.timestamp()) * 10**9, 1704175200 * 10**9),
        (HOURS, lambda t: str(int(t.timestamp())), 1704175200),
        (DAYS, lambda t: f"{t:%d.%m.%Y}", "04.02.2025"),
        (DAYS, lambda t: f"{t:%d/%m/%Y}", "04/02/2025"),
        (DAYS, lambda t: f"{t.month}/{t.day}/{t.year}", "2/4/2025"),
        (DAYS, lambda t: f"{t:%d/%m/%y}", "04/02/25"),
        (DAYS, lambda t: f"{t:%y-%m-%d}", "25-02-04"),
        (DAYS, lambda t: f"{t:%B %d, %Y}", "February 04, 2025"),
        (DAYS, lambda t: f"{t:%Y年%m月%d日}", "2025年02月04日"),
        (DAYS, lambda t: int(f"{t:%Y%m%d}"), 20250204),
        (DAYS, lambda t: t.date(), "2025-02-04"),
        (DAYS[:12], lambda t: f"{t:%d.%m.%Y}", "13.01.2024"),  # nothing decides but the points
        (MONTHS, lambda t: f"{t:%d/%m/%Y}", "01/01/2021"),  # nothing decides but equal steps
        (MONTHS, lambda t: f"{t:%Y-%m}", "2021-01"),
        (MONTHS, lambda t: int(f"{t:%Y%m}"), 202101),
        (MONTHS[::3], lambda t: f"{t.year}Q{t.quarter}", "2021Q1"),
        (pd.date_range("1990-01-01", periods=20, freq="YS"), lambda t: t.year, 2010),
    ],
)
def test_a_column_is_read_and_continued_as_it_is_written(truth, write, following):
    read = read_times([write(time) for time in truth], "date")
    assert read.stamps.tolist() == truth.tolist()
    assert read.format.written(times_after(read.stamps, 1)[0]) == following


def test_stamps_with_an_offset_keep_it_and_changing_ones_are_counted_in_utc():
    east = read_times([f"{time.isoformat()}+02:00" for time in HOURS], "date")
    assert east.stamps.tolist() == HOURS.tolist()
    assert east.format.clock == 120
    assert east.format.written(times_after(east.stamps, 1)[0]) == "2024-01-02T06:00:00+02:00"
    assert "offset from UTC +02:00" in east.note
    texts, objects = ([write(time) for time in BERLIN] for write in (str, lambda t: t.to_pydatetime()))
    for cells in (texts, objects):
        local = read_times(cells, "date")
        assert local.stamps.tolist() == BERLIN.tz_convert("UTC").tz_localize(None).tolist()
        assert regular_step(local.stamps) == pd.offsets.Hour()
        assert local.format.written(times_after(local.stamps, 1)[0]) == "2024-10-28 11:00:00+01:00"
    # a model that was trained in UTC+2 goes on in UTC+2, whatever offset later tables have
    later = read_times(["2024-01-02T00:00:00Z"], "date", known={"utc_offset": 120})
    assert later.stamps[0] == pd.Timestamp("2024-01-02 02:00:00")
    assert later.format.written(later.stamps[0]) == "2024-01-02T00:00:00Z"


def test_what_is_set_or_was_trained_on_decides_what_cells_leave_open():
    cells = ["01/02/2024", "02/02/2024"]
    for wanted in ({"time_format": "day_first"}, {"known": {"time_format": "day_first"}}):
        assert read_times(cells, "date", **wanted).stamps[0] == pd.Timestamp("2024-02-01")
    assert read_times(cells, "date", time_format="%m/%d/%Y").stamps[0] == pd.Timestamp("2024-01-02")
    assert read_times([45292, 45293.5], "date", time_format="excel_days").stamps[1] == pd.Timestamp("2024-01-02 12:00")
    months_of_two = [f"{time:%d/%m/%Y}" for time in MONTHS[:14]] * 2  # irregular as one series, monthly as two
    with pytest.raises(UserError, match="no row decides"):
        read_times(months_of_two, "date")
    assert read_times(months_of_two, "date", groups=["a"] * 14 + ["b"] * 14).stamps[1] == pd.Timestamp("2001-02-01")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["1/1/2024", "1/2/2024", "1/3/2024"], r"row 2 holds '1/2/2024', which may be 2024-02-01 or 2024-01-02"),
        (["1/1/2024", "1/2/2024", "1/3/2024"], r"set time_format=day_first or time_format=month_first"),
        (
            ["13/01/2024", "01/13/2024"],
            r"several ways: '13/01/2024' of row 1 has the day first, '01/13/2024' of row 2",
        ),
        (["2024-01-01", "01.02.2024"], r"row 2 holds '01.02.2024', written otherwise than '2024-01-01' of row 1"),
        (["2024-01-01", "soon"], r"row 2 holds 'soon', no time stamp .*time_format .*time_column=none"),
        (["2024-01-01", None], r"row 2 is empty \(1 of 2 rows are\)"),
        (["2024-02-30"], r"row 1 holds '2024-02-30', which is no date"),
        (["2024-01-01 25:00"], r"row 1 holds '2024-01-01 25:00', which is no time of day"),
        (["2024-01-01 00:00Z", "2024-01-01 01:00"], r"row 2, '2024-01-01 01:00', has no offset from UTC"),
        ([0, 1, 2], r"holds numbers \(0, ..., 2\) that are neither Unix times nor dates.*time_format"),
        ([1958.2, 1958.3], r"neither Unix times nor dates"),
        ([20240101, "2024-01-02"], r"several ways: row 1 20240101 and row 2 '2024-01-02'"),
    ],
)
def test_what_cannot_be_decided_is_refused_with_the_remedy(cells, message):
    with pytest.raises(UserError, match=message):
        read_times(cells, "date")


def series_of(times, names=None):
    from datasets import Dataset

    columns = {"date": [str(time) for time in times], "x": list(range(len(times)))}
    if names:
        columns["id"] = names
    reading = SeriesColumns(["x"], time="date", name="id" if names else None)
    return read_series(Dataset.from_dict(columns), reading, may_have_gaps=False, where="rows")


def test_rows_keep_their_order_where_the_clock_goes_back():
    quarters = pd.date_range("2024-10-27 00:00", "2024-10-27 02:45", freq="15min")
    wall = [*quarters, *pd.date_range("2024-10-27 02:00", "2024-10-27 05:00", freq="15min")]
    (series,), notes = series_of(wall)
    assert series.values[:, 0].tolist() == list(range(len(wall)))
    assert notes[0].startswith("rows: 4 time stamps are repeated (first: 2024-10-27 02:00:00, 2024-10-27 02:15:00, ")
    assert "daylight saving" in notes[-1]
    shuffled = [wall[3], *wall[:3], *wall[4:]]
    (series,), _ = series_of(shuffled)
    assert series.values[:4, 0].tolist() == [1, 2, 3, 0]


def test_several_series_taken_for_one_are_refused():
    stamps = [*DAYS[:5], *DAYS[:5]]
    with pytest.raises(UserError, match=r"5 of 10 time stamps are repeated .*id_column names the column"):
        series_of(stamps)
    series, _ = series_of(stamps, ["b"] * 5 + ["a"] * 5)
    assert [(one.name, len(one)) for one in series] == [("b", 5), ("a", 5)]


def test_steps_of_few_months_are_months():
    assert times_after(pd.DatetimeIndex(["2024-07-01", "2024-08-01"]), 2).tolist() == [
        pd.Timestamp("2024-09-01"),
        pd.Timestamp("2024-10-01"),
    ]
    assert datetime.timedelta(hours=36) == regular_step(pd.DatetimeIndex(["2024-01-30 00:00", "2024-01-31 12:00"]))
