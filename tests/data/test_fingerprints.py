"""Which data are the same, and in what others differ."""

import hashlib
import os

import pytest
from datasets import Dataset

from bmtk.data.fingerprints import FileDigests, differences, row_marks

ROWS = [{"text": f"row {number}", "label": number % 2} for number in range(5)]


def marks(rows):
    return {"train": row_marks(Dataset.from_list(rows))}


@pytest.mark.parametrize(
    ("now", "found"),
    [
        (ROWS, []),
        ([ROWS[1], ROWS[0], *ROWS[2:]], ["train: the rows are in another order"]),
        ([ROWS[0], {**ROWS[1], "label": 0}, *ROWS[2:]], ["train: 1 of 5 rows changed, first row 2"]),
        (ROWS[:4], ["train: 1 rows removed (5 before, 4 now)"]),
        ([*ROWS, ROWS[0]], ["train: 1 rows added (5 before, 6 now)"]),
        ([{"text": "new", "label": 0}, *ROWS[:3]], ["train: 1 rows added and 2 rows removed (5 before, 4 now)"]),
    ],
    ids=["same", "order", "label", "removed", "twice", "several"],
)
def test_what_differs_is_named(now, found):
    assert differences(marks(ROWS), marks(now), unit="row") == found


def test_a_split_that_came_or_went_is_named():
    train = marks(ROWS)
    both = {**train, "test": ["x"]}
    assert differences(train, both, unit="row") == ["test: there were no rows"]
    assert differences(both, train, unit="file") == ["test: there are no files any more"]


def test_a_file_is_read_again_only_if_its_size_or_time_is_another(tmp_path):
    file, cache = tmp_path / "a.txt", tmp_path / "cache" / "digests.json"
    file.write_text("one")
    os.utime(file, ns=(10, 10))
    first = FileDigests(cache).of(file)
    assert first == hashlib.sha256(b"one").hexdigest()
    file.write_text("two")
    os.utime(file, ns=(10, 10))
    assert FileDigests(cache).of(file) == first  # size and time are the same: it is not opened
    assert FileDigests(cache, may_read=False).of(file) == first
    os.utime(file, ns=(11, 11))
    assert FileDigests(cache, may_read=False).of(file).startswith("unread")
    assert FileDigests(cache).of(file) == hashlib.sha256(b"two").hexdigest()
    cache.write_text('{"half": ')
    assert FileDigests(cache).of(file) == hashlib.sha256(b"two").hexdigest()
