"""Rows that are read from a table's memory are those that the data set gives."""

import pickle

import datasets
import numpy as np
import pytest
from datasets import Dataset

from bmtk.data.number_rows import NumberBatch, NumberLists, NumberRows

DRAW = np.random.default_rng(0)
IDS = [DRAW.integers(0, 40_000, size=length).tolist() for length in DRAW.integers(0, 9, size=25)]
ROWS = Dataset.from_dict({"input_ids": IDS, "labels": [number % 3 for number in range(25)]})


def of_several_parts(tmp_path):
    """Mapped from a file in parts of seven rows, with a column that is in one part."""
    encoded = ROWS.map(lambda batch: batch, batched=True, batch_size=7, cache_file_name=str(tmp_path / "rows.arrow"))
    encoded = encoded.map(lambda row: {"marks": [1] * len(row["input_ids"])}, writer_batch_size=7)
    others = ROWS.rename_columns({"input_ids": "a", "labels": "b"})
    return datasets.concatenate_datasets([encoded, others], axis=1).select(range(2, 25))  # which is a slice


@pytest.mark.parametrize("indices", [[3], [22, 0, 7, 7, 13], list(range(23))])
def test_rows_are_those_of_the_data_set(indices, tmp_path):
    rows = of_several_parts(tmp_path)
    fast = NumberRows(rows)
    assert set(fast.columns) == {"input_ids", "labels", "marks", "a", "b"}
    assert len(fast.columns["input_ids"].ends) > 1
    assert list(fast.__getitems__(indices)) == rows.__getitems__(indices)
    assert len(fast) == 23


@pytest.mark.parametrize(
    "rows",
    [
        ROWS.select([4, 2, 9]),
        Dataset.from_dict({"input_ids": [[1], None, [2]]}),
        Dataset.from_dict({"input_ids": [[1], [None, 5], [2]]}),
        Dataset.from_dict({"input_ids": [[[1, 2], [3]], [], [[4]]]}),
        Dataset.from_dict({"text": ["a", "b", "c"], "labels": [0, 1, 2]}),
    ],
    ids=["a selection", "a list missing", "a number missing", "lists of lists", "texts"],
)
def test_other_rows_are_left_to_the_data_set(rows):
    fast = NumberRows(rows)
    assert fast.columns == {}
    assert list(fast.__getitems__([2, 0, 1])) == rows.__getitems__([2, 0, 1])


def test_another_process_gets_the_data_set_alone(tmp_path):
    fast = NumberRows(of_several_parts(tmp_path))
    size = len(pickle.dumps(fast))
    read = list(fast.__getitems__([4, 2]))
    assert len(pickle.dumps(fast)) == size
    assert list(pickle.loads(pickle.dumps(fast)).__getitems__([4, 2])) == read


def test_rows_below_0_are_refused(tmp_path):
    with pytest.raises(IndexError, match="row -1 is below 0"):
        NumberRows(of_several_parts(tmp_path)).__getitems__([3, -1])


def test_lists_are_padded_on_either_side():
    lists = NumberLists.of([[5, 6, 7], [], [8]])
    assert lists.padded(0).tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert lists.padded(-1, width=4, on_left=True).tolist() == [[-1, 5, 6, 7], [-1] * 4, [-1, -1, -1, 8]]
    assert list(lists) == [[5, 6, 7], [], [8]]


def test_a_batch_by_column_has_the_rows_of_the_data_set(tmp_path):
    batch = NumberRows(of_several_parts(tmp_path)).__getitems__([13, 0, 22])
    assert isinstance(batch, NumberBatch)
    assert (len(batch), batch[1], batch[-1]) == (3, of_several_parts(tmp_path)[0], list(batch)[2])
