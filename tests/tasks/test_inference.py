"""What predict.py reads and writes: every column of every row, and nothing of the user's overwritten."""

import csv
import datetime
import json
import os

import pytest

from bmtk.errors import UserError
from bmtk.tasks.inference import PredictionFile, beside_inputs, read_inputs, refuse_to_overwrite, shown
from recipes import predict


def written(path, rows, **options):
    output = PredictionFile(str(path), **options)
    with output:
        for row in rows:
            output.write(row)
    return output


def test_a_csv_of_unlike_rows_has_the_columns_of_all(tmp_path):
    rows = [{"a": 1, "b": []}, {"b": [{"x": 0.5}], "c": 'é, "q"\n'}, {"a": None}]
    output = written(tmp_path / "p.CSV", rows)
    assert output.count == 3
    with (tmp_path / "p.CSV").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["a", "b", "c"],
            ["1", "[]", ""],
            ["", '[{"x": 0.5}]', 'é, "q"\n'],
            ["", "", ""],
        ]
    written(tmp_path / "p.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()] == rows


def test_what_cannot_be_written_is_refused_by_its_own_name(tmp_path):
    (tmp_path / "p.csv").mkdir()
    with pytest.raises(UserError, match=r"output='.*/p\.csv' cannot be written \(Is a directory\); choose a file"):
        written(tmp_path / "p.csv", [{"a": 1}])


def test_an_error_leaves_the_former_file(tmp_path):
    (tmp_path / "p.csv").write_text("former")
    unwritable = ({name: 1} if name < "c" else {1: object()} for name in "abc")
    with pytest.raises(TypeError, match="not JSON serializable"):
        written(tmp_path / "p.csv", unwritable)
    assert (tmp_path / "p.csv").read_text() == "former"
    assert os.listdir(tmp_path) == ["p.csv"]


def test_formulas_are_counted_and_quoted_on_request(tmp_path):
    cells = ["=1+1", "@SUM(A1)", "-2+3", "+49 30", "-5", "1e3", "a=b", "\t=1"]
    rows = [{"text": cell, "n": -5} for cell in cells]
    for is_safe, done in ((False, "--spreadsheet_safe quotes them"), (True, "an apostrophe stands before them")):
        output = written(tmp_path / "p.csv", rows, spreadsheet_safe=is_safe)
        with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
            found = [row["text"] for row in csv.DictReader(file)]
        quoted = ["'=1+1", "'@SUM(A1)", "'-2+3", "'+49 30", "-5", "1e3", "a=b", "'\t=1"]
        assert found == (quoted if is_safe else cells)
        assert output.notes == [
            f"5 cells of {tmp_path / 'p.csv'} begin as formulas do, which a spreadsheet runs: {done}"
        ]
    assert written(tmp_path / "p.jsonl", rows).notes == []


def test_a_column_of_the_input_is_never_overwritten():
    assert beside_inputs({"text": "a"}, {"prediction": "b"}) == {"text": "a", "prediction": "b"}
    with pytest.raises(ValueError, match=r"columns of its own called prediction, score, .*; rename or remove them"):
        beside_inputs({"text": "a", "score": 1, "prediction": "MINE"}, {"prediction": "b", "score": 0.5})


def test_what_is_repeated_of_a_row():
    row = {
        "text": "x" * 2000,
        "at": datetime.datetime(2024, 1, 5, 12),
        "entities": [{"start": 0}],
        "meta": {"n": 1},
        "box": [1, 2],
        "image": {"bytes": b"pixels", "path": None},
        "samples": [0.25] * 5000,
        "raw": b"x",
    }
    assert shown(row) == {
        "text": "x" * 1000,
        "at": "2024-01-05T12:00:00",
        "entities": [{"start": 0}],
        "meta": {"n": 1},
        "box": [1, 2],
    }


def test_the_output_may_not_be_what_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    table = tmp_path / "in" / "rows.csv"
    table.write_text("text\na\n")
    (tmp_path / "link.csv").symlink_to(table)
    os.link(table, tmp_path / "hard.csv")
    for source in (table, table.parent):
        for output in (
            table,
            tmp_path / "in" / ".." / "in" / "rows.csv",
            tmp_path / "link.csv",
            tmp_path / "hard.csv",
        ):
            with pytest.raises(ValueError, match=r"output=.* is one of the files of input=.*; name another file"):
                refuse_to_overwrite(str(source), str(output))
        refuse_to_overwrite(str(source), str(tmp_path / "new.csv"))
    (tmp_path / "other.csv").write_text("text\na\n")
    refuse_to_overwrite(str(table), str(tmp_path / "other.csv"))
    assert read_inputs(str(table))[:] == {"text": ["a"]}


def test_predict_refuses_to_write_over_its_input_before_it_loads_a_model(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("text\na\n")
    with pytest.raises(ValueError, match=r"is one of the files of input"):
        predict.main(["--model", str(tmp_path / "no_model"), "--input", str(table), "--output", str(table)])
    assert table.read_text() == "text\na\n"
