"""Columns that are added to tables, and gaps that are found in them, without reading the other columns."""

from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from bmtk.data.columns import first_missing, with_columns

VALUES = st.lists(st.none() | st.text(max_size=2), min_size=1, max_size=9)


@given(VALUES, st.data())
@settings(max_examples=40, deadline=None)
def test_columns_belong_to_the_rows_of_a_selection(values, data):
    table = Dataset.from_dict({"old": values})
    chosen = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=12))  # also one twice
    numbers = [10 * place for place in range(len(chosen))]
    found = with_columns(table.select(chosen), {"new": numbers, "more": [[number] for number in numbers]})
    expected = zip(chosen, numbers, strict=True)
    assert found.to_list() == [{"old": values[row], "new": number, "more": [number]} for row, number in expected]
    again = with_columns(found.select(range(len(chosen))[::-1]), {"last": numbers})
    assert again["new"][:] == numbers[::-1]
    assert again["last"][:] == numbers


def test_nothing_is_copied():
    table = Dataset.from_dict({"old": ["a" * 1000, "b", "c"]})
    found = with_columns(table.select([2, 0]), {"new": [1, 2]})
    addresses = [rows.data.table.column("old").chunk(0).buffers()[2].address for rows in (table, found)]
    assert addresses[0] == addresses[1]


@given(VALUES, st.data())
@settings(max_examples=40, deadline=None)
def test_the_first_gap_is_found(values, data):
    chosen = data.draw(st.permutations(range(len(values))))[: data.draw(st.integers(1, len(values)))]
    expected = next((place for place, row in enumerate(chosen) if values[row] is None), None)
    assert first_missing(Dataset.from_dict({"column": values}).select(chosen), "column") == expected
