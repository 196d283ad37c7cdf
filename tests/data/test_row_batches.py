"""Large tables are read as streams and kept in a file; they hold the same as small ones, and as all values at once."""

import json
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bmtk.data import row_batches, text_tables
from bmtk.data.row_batches import Batches, batched, table_of
from bmtk.data.tables import read_table

WORDS = st.text(max_size=3)
NUMBERS = st.integers(-5, 5) | st.sampled_from([2**60 + 1, 2**63, 2**64]) | st.floats(-2, 2)
CELLS = [NUMBERS, WORDS, st.booleans(), NUMBERS | WORDS, NUMBERS | st.booleans(), st.lists(NUMBERS, max_size=2)]
CELLS += [st.fixed_dictionaries({}, optional={"a": NUMBERS, "b": WORDS}), st.lists(NUMBERS | WORDS, max_size=2)]
ROWS = st.one_of(
    [st.lists(st.fixed_dictionaries({"n": WORDS}, optional={"x": st.none() | cell}), min_size=1) for cell in CELLS]
)


def at_once(rows):
    """What `pyarrow.array` makes of all values of a column, or their texts; truth values are like no others."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        try:
            if bool in kinds and len(kinds) > 1:
                raise pyarrow.ArrowInvalid("unlike")
            found[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
            found[name] = pyarrow.array(texts)
    return pyarrow.table(found)


@given(rows=ROWS, at_a_time=st.integers(1, 4), in_file=st.booleans())
@example(rows=[{"x": 0.5}, {"x": True}], at_a_time=1, in_file=True)  # Arrow: [0.5, 1.0], together
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_batches_make_the_table_of_all_values(tmp_path, monkeypatch, rows, at_a_time, in_file):
    monkeypatch.setattr(row_batches, "ROWS_AT_ONCE", at_a_time)
    monkeypatch.setattr(row_batches, "SMALL", -1 if in_file else 1 << 24)
    path, expected = tmp_path / "kept.arrow", at_once(rows)
    batches = Batches(lambda: batched((1, row) for row in rows))
    table = table_of(batches, where="it", notes=[], kept_at=lambda: path)
    assert table.data.table.schema.remove_metadata() == expected.schema
    assert table.data.table.to_pylist() == expected.to_pylist()
    assert bool(table.cache_files) == in_file


FILES = {
    "a.csv": "text,label,,tokens\n\"x\ny\",1,,\"['a']\"\nz;,b,,\nu,,,\"['b', 'c']\"\n",
    "a.tsv": 'text\tlabel\n"x"\t1\ny\tb\n',
    "a.jsonl": '{"text": "x", "label": 1}\n{"text": "y", "more": [1]}\n{"label": "b"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_a_large_file_is_kept_and_is_the_same_table(tmp_path, monkeypatch, name):
    path, notes, of_large = tmp_path / name, [], []
    path.write_text(FILES[name])
    small = read_table([path], notes=notes)
    assert small.cache_files == []
    assert len(notes) > 0
    monkeypatch.setattr(row_batches, "SMALL", 0)
    monkeypatch.setattr(row_batches, "ROWS_AT_ONCE", 1)
    large = read_table([path], notes=of_large)
    (kept,) = {file["filename"] for file in large.cache_files}
    assert (large.to_list(), large.column_names, of_large) == (small.to_list(), small.column_names, notes)
    with monkeypatch.context() as patch:  # it is not read again
        patch.setattr(text_tables, "table_of", lambda *args, **kwargs: pytest.fail("it was read again"))
        again: list[str] = []
        assert read_table([path], notes=again).to_list() == small.to_list()
        assert again == notes
    content = Path(kept).read_bytes()
    Path(kept).write_bytes(content[: len(content) // 2])  # damaged: it is made anew
    assert read_table([path]).to_list() == small.to_list()
    before = path.stat()
    path.write_text(FILES[name].replace("y", "v"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as large and as old, but another
    changed = read_table([path]).to_list()
    assert "v" in json.dumps(changed)
    assert changed != small.to_list()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_memory_does_not_grow_with_a_file(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(row_batches, "SMALL", 1 << 19)
    monkeypatch.setattr(row_batches, "CHARACTERS_AT_ONCE", 1 << 17)
    path, text = tmp_path / f"large{suffix}", "word " * 400
    with path.open("w") as file:
        file.write("" if suffix == ".jsonl" else {".csv": "text,label\n", ".tsv": "text\tlabel\n"}[suffix])
        for row in range(4000):  # 8 MB
            cells = [f"{row} {text}", "ab"[row % 2]]
            is_json = suffix == ".jsonl"
            line = json.dumps(dict(zip(("text", "label"), cells, strict=True))) if is_json else None
            file.write((line or ("," if suffix == ".csv" else "\t").join(cells)) + "\n")
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    table = read_table([path])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 4000
    assert table[3999]["text"] == f"3999 {text}"
    assert pyarrow.total_allocated_bytes() - before < 1e6
    assert peak < 3e6  # of 8: what a small table may have and a batch, or two blocks of 1 MiB that are hashed
