"""Parquet files become the tables that pyarrow reads of them, in little memory, and are copied once."""

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Features, List, Value

from bmtk.data import parquet_tables
from bmtk.data.tables import read_table
from bmtk.errors import UserError


def write_parts(folder, rows: int = 25) -> list:
    """Three files of rows with numbers, lists, gaps and names of classes, in groups of four rows."""
    kinds = Features({"number": Value("int64"), "words": List(Value("string")), "kind": ClassLabel(names=["a", "b"])})
    paths = []
    for part in range(3):
        values = range(part * rows, (part + 1) * rows)
        columns = {
            "number": [None if value % 7 == 0 else value for value in values],
            "words": [[f"word {value}"] * (value % 3) for value in values],
            "kind": [value % 2 for value in values],
        }
        paths.append(folder / f"part-{part}.parquet")
        table = pyarrow.table(columns, schema=kinds.arrow_schema)
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=4)
    return paths


@pytest.mark.parametrize("num_bytes", [1, 200, 1 << 22])  # a row, some rows or all of them at once
def test_rows_types_and_their_order_are_those_of_the_files(tmp_path, monkeypatch, num_bytes):
    monkeypatch.setattr(parquet_tables, "CHARACTERS_AT_ONCE", num_bytes)
    paths = write_parts(tmp_path)
    table = read_table(paths)
    expected = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in paths])
    assert table.to_list() == expected.to_pylist()
    assert table.features["kind"].names == ["a", "b"]
    assert table.column_names == expected.column_names
    if num_bytes == 1:
        assert table.data.column("number").num_chunks == len(table)


def test_files_are_copied_once_and_again_when_they_change(tmp_path, monkeypatch):
    paths = write_parts(tmp_path)
    table = read_table(paths)
    with monkeypatch.context() as patch:
        patch.setattr(parquet_tables, "in_file", lambda *args: pytest.fail("it was copied again"))
        assert read_table(paths).to_list() == table.to_list()
    rows = pyarrow.parquet.read_table(paths[0])
    pyarrow.parquet.write_table(rows.slice(1), paths[0])
    assert read_table(paths).to_list() == table.to_list()[1:]


def test_columns_of_a_file_follow_those_of_the_first(tmp_path):
    one, other, third = (tmp_path / f"{name}.parquet" for name in "abc")
    pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2], "y": ["a", "b"]}), one)
    pyarrow.parquet.write_table(pyarrow.table({"y": ["c"], "x": pyarrow.array([3], pyarrow.int8())}), other)
    assert read_table([one, other]).to_list() == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}, {"x": 3, "y": "c"}]
    pyarrow.parquet.write_table(pyarrow.table({"x": [4], "z": ["d"]}), third)
    with pytest.raises(UserError, match=r"c\.parquet, beside .*a\.parquet, cannot be read: CastError: .*"):
        read_table([one, third])


def test_a_file_that_is_cut_off_and_one_without_rows_are_named(tmp_path):
    (path, *_), empty = write_parts(tmp_path), tmp_path / "empty.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(100) + content[104:])  # the pages, not what is known of them at the end
    with pytest.raises(UserError, match=r"part-0\.parquet cannot be read: \w+"):
        read_table([path])
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([], pyarrow.int64())}), empty)
    with pytest.raises(UserError, match=r"empty\.parquet has no rows"):
        read_table([empty])


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_memory_is_that_of_some_rows_however_large_a_row_group_is(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(parquet_tables, "CHARACTERS_AT_ONCE", 1 << 20)
    draw, path = np.random.default_rng(0), tmp_path / "rows.parquet"
    table = pyarrow.table({"bytes": [draw.bytes(1 << 15) for _ in range(1000)]})  # 32 MB in one row group
    options = {"compression": compression, "data_page_size": 1 << 18, "write_batch_size": 8, "use_dictionary": False}
    pyarrow.parquet.write_table(table, path, row_group_size=1000, **options)
    counted, usual = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool()), pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(counted)
    try:
        found = read_table([path])
    finally:
        pyarrow.set_memory_pool(usual)
    assert found.data.column("bytes").equals(table.column("bytes"))
    assert counted.max_memory() < 8e6


def test_a_copy_that_is_damaged_is_made_anew(tmp_path):
    paths = write_parts(tmp_path)
    table = read_table(paths)
    (kept,) = {file["filename"] for file in table.cache_files}
    expected = table.to_list()
    os.truncate(kept, os.path.getsize(kept) // 2)
    assert read_table(paths).to_list() == expected


def test_a_disk_that_is_full_is_no_fault_of_the_file(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pyarrow.ipc, "new_stream", Full)
    with pytest.raises(OSError, match="No space left") as found:
        read_table(write_parts(tmp_path))
    assert not isinstance(found.value, UserError)


def test_what_a_killed_process_left_of_a_copy_is_deleted_a_day_later(tmp_path):
    paths = write_parts(tmp_path)
    kept = Path(read_table(paths).cache_files[0]["filename"])
    old, new, other = (
        kept.with_name(f".partial-{name}.arrow.new") for name in (f"{kept.stem}-a", f"{kept.stem}-b", "c")
    )
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    kept.unlink()
    assert len(read_table(paths)) == 75
    assert [path.exists() for path in (kept, old, new, other)] == [True, False, True, True]
