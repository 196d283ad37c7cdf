"""Tables as users have them: the right value is what was written, in whatever format, encoding and compression."""

import bz2
import gzip
import json
import lzma

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from bmtk.data.labels import agreed_labels, label_name, note_blanks
from bmtk.data.printed import printed_value, printed_values
from bmtk.data.sources import read_texts
from bmtk.data.tables import encoded_rows, files_read, read_all, read_splits, read_table, text_cells
from bmtk.data.text_files import TableFormat

ROWS = [('Straße, "so" 東京', "ja"), ("C'était; là", "nein"), ("x|y", "ja")]
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


def csv_text(delimiter=",", rows=ROWS):
    frame = pandas.DataFrame(rows, columns=["text", "label"])
    return frame.to_csv(sep=delimiter, index=False)


def read(path, notes=None, **layout):
    return read_table([path], TableFormat(**layout), notes)


def rows_of(path, notes=None, **layout):
    return [(row["text"], row["label"]) for row in read(path, notes, **layout)]


# CSV and TSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_a_csv_file_is_found_and_noted(tmp_path, delimiter):
    notes = []
    assert rows_of(write(tmp_path / "a.csv", csv_text(delimiter)), notes) == ROWS
    assert notes == ([] if delimiter == "," else [f"{tmp_path / 'a.csv'}: cells are divided by {delimiter!r}"])


def test_decimal_commas_do_not_divide_cells(tmp_path):
    assert read(write(tmp_path / "a.csv", "day;value\n1;2,5\n2;3,5\n"))[:] == {
        "day": ["1", "2"],
        "value": ["2,5", "3,5"],
    }


def test_the_delimiter_can_be_set_and_announced(tmp_path):
    assert rows_of(write(tmp_path / "a.csv", "text:label\na,b:1\n"), delimiter=":") == [("a,b", "1")]
    assert rows_of(write(tmp_path / "b.csv", "sep=;\ntext;label\na,b;1\n")) == [("a,b", "1")]
    assert rows_of(write(tmp_path / "c.tsv", "text\tlabel\na,b\t1\n"), delimiter="tab") == [("a,b", "1")]
    both = write(tmp_path / "d.csv", "text,a;label\nx,b;1\n")
    with pytest.raises(ValueError, match=r"d\.csv, line 1: both ',' and ';' divide every row .*; set delimiter"):
        read(both)
    with pytest.raises(ValueError, match=r"delimiter='ab' is not a single character"):
        TableFormat(delimiter="ab")


def test_a_tsv_file_is_read_line_by_line_and_keeps_its_quotes(tmp_path):
    notes = []
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"No, she said.\tx\nNever."\ty\n5" wide\tx\n"Go."\ty\n')
    texts = ['"No, she said.', 'Never."', '5" wide', '"Go."']
    assert list(read(path, notes)["text"]) == texts
    assert notes == [
        f"{path}: 1 cells begin and end with a double quote, which is kept (if it is not part of them, rename the "
        "file to .csv); the first in line 5: '\"Go.\"'"
    ]


def test_a_tsv_file_that_is_quoted_as_csv_throughout_is_read_so(tmp_path):
    notes = []
    assert rows_of(write(tmp_path / "a.tsv", csv_text("\t")), notes) == ROWS
    assert "quotes around cells are taken off" in notes[0]


def test_cells_with_line_breaks_are_counted(tmp_path):
    notes = []
    path = write(tmp_path / "a.csv", 'text,label\na,1\n"two\nlines",2\n"three\n\nlines",1\n')
    assert rows_of(path, notes) == [("a", "1"), ("two\nlines", "2"), ("three\n\nlines", "1")]
    assert notes == [
        f"{path}: 2 cells have a line break within quotes: see that no quote was left open; the first in line 3: "
        "'two\\nlines'"
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\n"a\nb",1\n"open,2\nc,3\n', r"a\.csv is not a table .* \(line 4: unexpected end"),
        ("a.csv", 'text,label\na,1\n"a" b,2\n', r"\(line 3: ',' expected after '\"': a cell that begins with"),
        ("a.csv", 'text,label\n"a\nb",1\nc\n', r"a\.csv, line 4: the row has 1 fields, the header 2"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", r"a\.tsv, line 2: the row has 3 fields, the header 2 \(text, label\)"),
        ("a.csv", "text,label, label\na,1,2\n", r"line 1: .* a column twice: 'label' \(columns 2, 3\); rename"),
        ("a.tsv", "a\ta\n1\t2\n", r"a\.tsv, line 1: the header names a column twice: 'a'"),
        ("a.csv", "text,,\na,1,2\n", r"columns 2, 3 have cells and no name; name them"),
        ("a.csv", b"PK\x03\x04rest", r"it is a zip archive or an Excel workbook"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"line 2: not a line of JSON \(an object has 'a' twice"),
        ("a.jsonl", '[{"a": 1}]\n', r"line 1: expected a JSON object, found list; .* \.json"),
        ("a.json", '[{"a": 1}, 5]', r"row 2: expected a JSON object, found int"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"cannot be read: line 2: not JSON \(Expecting ':' delimiter"),
        ("a.jsonl", '{"a": "x"}\n{"a": "\\ud800"}', r"a\.jsonl, line 2: the text is not Unicode"),
    ],
)
def test_a_fault_is_named_with_its_line_and_remedy(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, content))


def test_blanks_around_names_and_empty_columns_at_the_end_are_dropped(tmp_path):
    assert read(write(tmp_path / "a.csv", "text; label ;;\na;1;;\n"))[:] == {"text": ["a"], "label": ["1"]}


def test_a_cell_may_be_longer_than_the_csv_modules_limit(tmp_path):
    assert len(read(write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n"))[0]["text"]) == 200_000


# encodings and compression -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_a_byte_order_mark_decides_the_encoding(tmp_path, name, encoding):
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in ROWS]
    content = {"a.csv": csv_text(), "a.tsv": csv_text("\t"), "a.jsonl": "\n".join(lines)}
    path = write(tmp_path / name, content.get(name, f"[{','.join(lines)}]"), encoding)
    assert rows_of(path) == ROWS


def test_another_encoding_is_named_at_its_place_and_can_be_set(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nplain,1\nC'était,2\n", "windows-1252")
    with pytest.raises(
        ValueError,
        match=r"\(line 3: can't decode 0xe9 \(byte 22 of the file\) as UTF-8; .*C'était.* with --encoding windows-",
    ):
        read(path)
    assert rows_of(path, encoding="windows-1252") == [("plain", "1"), ("C'était", "2")]
    chinese = write(tmp_path / "b.jsonl", '{"text": "东京", "label": "日"}\n', "gbk")
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read: line 1: .*'\{\"text\": \"东京.*--encoding gbk"):
        read(chinese)
    assert rows_of(chinese, encoding="gbk") == [("东京", "日")]
    unmarked = write(tmp_path / "c.csv", csv_text(), "utf-16-le")
    with pytest.raises(ValueError, match=r"every second byte is 0, .*: set encoding=utf-16-le"):
        read(unmarked)
    assert rows_of(unmarked, encoding="utf-16-le") == ROWS
    for name in ("klingon", "base64"):
        with pytest.raises(ValueError, match=rf"encoding='{name}' is unknown; give a name such as utf-8"):
            TableFormat(encoding=name)


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_tables_are_read_whatever_their_names_say(tmp_path, suffix):
    content = PACKED[suffix](csv_text().encode())
    assert rows_of(write(tmp_path / f"A.CSV{suffix.upper()}", content)) == ROWS
    assert rows_of(write(tmp_path / "a.csv", content)) == ROWS
    assert list(read_texts(write(tmp_path / f"b.csv{suffix}", content))) == [text for text, _ in ROWS]
    with pytest.raises(ValueError, match=r"c\.csv.* \(the compressed file \(\.\w+\) is damaged"):
        read(write(tmp_path / f"c.csv{suffix}", content[:-12]))


def test_zstandard_is_read(tmp_path):
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write("".join(f"{json.dumps({'text': t, 'label': n})}\n" for t, n in ROWS * 5000).encode())
    assert rows_of(tmp_path / "a.jsonl.zst") == ROWS * 5000


def test_a_folder_of_upper_case_and_compressed_files_is_read_by_split(tmp_path):
    write(tmp_path / "TRAIN.CSV".replace("TRAIN", "train"), csv_text())
    write(tmp_path / "test.CSV.gz", gzip.compress(csv_text(rows=ROWS[:1]).encode()))
    found = read_splits(str(tmp_path), files={})
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "test": 1}
    assert len(read_all(str(tmp_path / "test.CSV.gz"), option="input")) == 1
    assert files_read(str(tmp_path)) == sorted(tmp_path.iterdir())


def test_corpora_know_the_same_formats(tmp_path):
    tsv = write(tmp_path / "a.TSV", 'text\n"open\nend"\n')
    assert list(read_texts(tsv)) == ['"open', 'end"']
    old = write(tmp_path / "b.csv", "id;text\n1;là, là\n", "windows-1252")
    assert list(read_texts(old, layout=TableFormat(encoding="windows-1252"))) == ["là, là"]
    assert list(read_texts(write(tmp_path / "c.txt", "été", "utf-16"))) == ["été"]
    packed = read_texts(write(tmp_path / "d.txt.gz", gzip.compress(b"some text")))
    assert list(packed) == ["some text"]
    assert packed.num_bytes is None  # that of the text is not known
    assert read_texts(old).fingerprint != read_texts(old, layout=TableFormat(encoding="gbk")).fingerprint


# types ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_values_stay_what_they_are(tmp_path, name):
    rows = [
        {"day": "2024-01-05", "id": 2**53 + 1, "count": 1, "zip": "01234", "mixed": 7, "big": 2**70},
        {"day": "2024-02-05", "id": 2**53, "count": None, "zip": "1e5", "mixed": "seven", "big": 1},
        {"day": "May", "id": None, "zip": "nan", "mixed": True, "big": 2.5, "late": [1]},
    ]
    lines = list(map(json.dumps, rows))
    notes = []
    table = read(write(tmp_path / name, "\n".join(lines) if name == "a.jsonl" else f"[{', '.join(lines)}]"), notes)
    assert list(table["day"]) == ["2024-01-05", "2024-02-05", "May"]
    assert list(table["id"]) == [9007199254740993, 9007199254740992, None]
    assert list(map(str, table["count"])) == ["1", "None", "None"]
    assert list(table["zip"]) == ["01234", "1e5", "nan"]
    assert list(table["mixed"]) == ["7", "seven", "true"]
    assert list(table["big"]) == ["1180591620717411303424", "1", "2.5"]
    assert list(table["late"]) == [None, None, [1]]
    assert notes == [
        f"column 'mixed' of {tmp_path / name} holds unlike values (bool, int, str): read as texts",
        f"column 'big' of {tmp_path / name} holds unlike values (float, int): read as texts",
    ]


@pytest.mark.parametrize("orient", ["records", "columns", "list"])
def test_json_files_of_pandas_are_read(tmp_path, orient):
    frame = pandas.DataFrame({"text": ["a", "b"], "label": [1, 0]})
    content = json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient)
    assert rows_of(write(tmp_path / "a.json", content)) == [("a", 1), ("b", 0)]


def test_a_json_object_with_data_is_one_row(tmp_path):
    content = {"version": "2", "data": [{"title": "a"}, {"title": "b"}]}
    assert read(write(tmp_path / "a.json", json.dumps(content)))[:] == {name: [v] for name, v in content.items()}


def test_parquet_bytes_are_texts_or_refused_and_times_stay_times(tmp_path):
    columns = {"text": [b"caf\xc3\xa9", None], "raw": [b"\xff", b"x"], "at": pandas.to_datetime(["2024-01-05"] * 2)}
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    table = pyarrow.table({**columns, "label": [1, 0]})
    pyarrow.parquet.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), tmp_path / "a.parquet")
    notes = []
    rows = read(tmp_path / "a.parquet", notes)
    assert list(rows["text"]) == ["café", None]
    assert str(rows[0]["at"]) == "2024-01-05 00:00:00"
    assert notes == [f"column 'text' of {tmp_path / 'a.parquet'} holds bytes: read as text in UTF-8"]
    with pytest.raises(ValueError, match=r"text_column='raw' of train row 1 holds bytes that are not UTF-8"):
        text_cells(rows, "raw", option="text_column", where="train")
    write(tmp_path / "b.parquet.gz", gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(ValueError, match=r"b\.parquet\.gz is compressed as a whole"):
        read(tmp_path / "b.parquet.gz")
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c\.parquet has a column twice: a"):
        read(tmp_path / "c.parquet")


# printed values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("['EU', \"don't\", 'x, y']", ["EU", "don't", "x, y"]),
        ('["a", null]', ["a", None]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),  # of numpy; Python would join them
        ("[1 0 -2]", [1, 0, -2]),
        ("('a', 'b')", ["a", "b"]),
        ("{'text': ['x'], 'answer_start': [3]}", {"text": ["x"], "answer_start": [3]}),
        ("[]", []),
        ("b'caf\\xc3\\xa9'", "café"),
        ("[deleted]", None),
        ("['a', 'b'", None),
        ("__import__('os')", None),
        ("[0, 10)", None),
        ("a text", None),
    ],
)
def test_a_printed_value_is_read_back(cell, value):
    assert printed_value(cell) == value


def test_a_column_is_read_as_values_only_if_every_cell_is_one(tmp_path):
    assert printed_values(["['a']", "", "['b', 'c']"]) == [["a"], None, ["b", "c"]]
    assert printed_values(["['a']", "b"]) is None
    assert printed_values(["['a']", "{'b': 1}"]) is None
    assert printed_values(["", ""]) is None
    notes = []
    path = tmp_path / "a.csv"
    pandas.DataFrame({"tokens": [["a", "b"], ["c"]], "id": ["x", "y"]}).to_csv(path, index=False)
    assert read(path, notes)[:] == {"tokens": [["a", "b"], ["c"]], "id": ["x", "y"]}
    assert notes == [f"{path}: 'tokens' hold values that were printed as text, such as lists: they are read as values"]


def test_a_list_is_no_text_and_a_printed_one_no_label():
    rows = datasets.Dataset.from_dict({"text": [["a", "b"]], "pair": [{"en": "x"}], "number": [5], "gap": [None]})
    with pytest.raises(ValueError, match=r"text_column='text' of train row 1 holds a list \(\['a', 'b'\]\), and one"):
        text_cells(rows, "text", option="text_column", where="train")
    with pytest.raises(ValueError, match=r"row 1 holds en together .*give it as a text"):
        text_cells(rows, "pair", option="text_column", where="train")
    assert text_cells(rows, "number", option="o", where="w") == ["5"]
    assert text_cells(rows, "gap", option="o", where="w") == [""]
    for cell in ("['a', 'b'", "['a' 'b']", b"pos", ["a"], "b'pos'"):
        with pytest.raises(ValueError, match=r"row 3 holds .*, and a label is one word or number"):
            label_name(cell, None, "row 3")
    assert label_name("[0, 10)", None, "row 1") == "[0, 10)"


def test_blanks_around_labels_are_taken_off_and_counted():
    assert [label_name(name, None, "row") for name in ("pos ", "pos", "\u00a0pos")] == ["pos"] * 3
    assert label_name(" 1 ", ["bad ", "good"], "row") == "good"
    with pytest.raises(ValueError, match="row 2 is empty"):
        label_name("  ", None, "row 2")
    assert agreed_labels({"pos"}, ["neg", "pos "], [], is_trained=False)[1] == {"neg": 0, "pos": 1}
    notes = []
    note_blanks(["pos ", "pos", [" a", "b"], None], notes, option="label_column='label'", where="train")
    assert notes == ["label_column='label': 2 train labels have blanks around them, taken off: 'pos '"]


FACTOR = 2


class Multiplied:
    """Its code is no part of how `datasets` knows it."""

    def __call__(self, batch: dict) -> dict:
        return {"b": [FACTOR * value for value in batch["a"]]}


def test_rows_in_a_file_are_encoded_anew_by_code_that_has_changed(tmp_path, monkeypatch):
    Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    rows = read_table([tmp_path / "a.parquet"])
    assert rows.cache_files
    assert encoded_rows(rows, Multiplied())["b"] == [2, 4]
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert encoded_rows(rows, Multiplied())["b"] == [3, 6]
