"""Tables with one row a series: lists become steps, named and timed; what does not fit together is refused."""

import pytest
from datasets import Dataset

from bmtk.data.series_rows import one_row_a_step
from bmtk.errors import UserError

READING = {"time_column": "date", "id_column": None, "time_format": None}


def steps(columns, **reading):
    return one_row_a_step(Dataset.from_dict(columns), "train", **{**READING, **reading})


@pytest.mark.parametrize("cells", [[[1, 2, 3], [4, 5]], ["[1, 2, 3]", "[4, 5]"], ["[1. 2. 3.]", "[4. 5.]"]])
def test_lists_become_steps(cells):
    table, names, note = steps({"id": ["a", "b"], "target": cells})
    assert names == "id"
    assert table["id"] == ["a", "a", "a", "b", "b"]
    assert table["target"] == [1, 2, 3, 4, 5]
    assert note == "train: one row a series: 2 series of 2 to 3 steps, named by id"


def test_a_table_of_one_row_a_step_stays_as_it_is():
    columns = {"date": ["2024-01-01", "2024-01-02"], "x": ["1", "2"], "tags": [["a"], ["b"]]}
    table, names, note = steps(columns, id_column="tags")
    assert (table.column_names, names, note) == (["date", "x", "tags"], "tags", "")


def test_time_stamps_are_lists_or_a_start_and_a_step():
    table, _, _ = steps({"date": [["2024-01-01", "2024-01-02"]], "x": [[1, 2]]})
    assert table["date"] == ["2024-01-01", "2024-01-02"]
    table, names, _ = steps({"date": ["31.12.2023", "13.01.2024"], "freq": ["12h", "1D"], "x": [[1, 2], [3]]})
    assert table["date"] == ["2023-12-31 00:00:00", "2023-12-31 12:00:00", "2024-01-13 00:00:00"]
    assert (names, table["series"]) == ("series", ["1", "1", "2"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": [[1, 2]], "y": [[1]]}, "train row 1: y has 1 values and x 2"),
        ({"date": [["2024-01-01"]], "x": [[1, 2]]}, "train row 1: date has 1 time stamps for 2 values"),
        ({"date": ["2024-01-01"], "x": [[1, 2]]}, "no column freq or frequency or step .* set time_column=none"),
        ({"date": ["2024-01-01"], "freq": ["often"], "x": [[1, 2]]}, "freq='often' is no step such as 1h"),
        ({"x": ["[1, 2]", "one"]}, "x of row 2 is no list of numbers"),
        ({"x": [[[1, 2], [3, 4]]]}, "x of row 1 is a list of lists"),
    ],
)
def test_what_does_not_fit_together_is_refused(columns, message):
    with pytest.raises(UserError, match=message):
        steps(columns)
