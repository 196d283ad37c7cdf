import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from bmtk.data.sources import Texts, read_texts, text_fingerprint


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_text_file_is_one_document_kept_to_the_byte(tmp_path):
    file = write(tmp_path / "a.txt", "one\r\n\ntwo\n")
    assert list(read_texts(file)) == ["one\r\n\ntwo\n"]


def test_a_text_file_by_line_drops_line_ends_and_blank_lines(tmp_path):
    file = write(tmp_path / "a.txt", "\ufeffone\r\n \n\ntwo\nthree")
    assert list(read_texts(str(file), sample_by="line")) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_tables_give_the_chosen_column_without_blanks(tmp_path, name):
    file = tmp_path / name
    if name == "a.csv":
        write(file, '\ufeffbody,id\n"a, ""b""\nc",1\n,2\nNA,3\n\n"d\r\ne",5\n')
    elif name == "a.jsonl":
        write(file, '\ufeff{"body": "a, \\"b\\"\\nc"}\n\n{"body": null}\n{"body": "NA"}\r\n{"body": "d\\r\\ne"}')
    else:
        write_parquet(file, id=[1, 2, 3, 4], body=['a, "b"\nc', None, "NA", "d\r\ne"])
    texts = read_texts(file, text_column="body")
    assert list(texts) == ['a, "b"\nc', "NA", "d\r\ne"]
    assert list(texts) == list(texts)  # it can be read again


def test_a_csv_text_may_be_longer_than_the_csv_modules_limit(tmp_path):
    file = write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert [len(text) for text in read_texts(file)] == [200_000]


def test_a_folder_is_divided_by_the_names_of_its_files(tmp_path):
    for name in ("train-00001.txt", "train-00000.txt", "valid.txt", "test/x.txt", "notes.txt"):
        write(tmp_path / name, name)
    write(tmp_path / "train.md", "not a corpus")
    assert list(read_texts(tmp_path, split="train")) == ["train-00000.txt", "train-00001.txt"]
    assert list(read_texts(tmp_path, split="validation")) == ["valid.txt"]
    assert list(read_texts(tmp_path, split="test")) == ["test/x.txt"]
    assert list(read_texts(tmp_path, split="notes")) == ["notes.txt"]


def test_a_folder_without_split_names_is_all_train(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        write(tmp_path / name, name)
    assert list(read_texts(tmp_path, split="train")) == ["a.txt", "b.txt", "deep/c.txt"]
    with pytest.raises(ValueError, match=r"split='validation' is not in .*there are a.txt, b.txt, deep/c.txt"):
        read_texts(tmp_path, split="validation")


def test_a_list_of_sources_is_read_in_its_order(tmp_path):
    sources = [write(tmp_path / "b.txt", "B"), write_parquet(tmp_path / "a.parquet", text=["A", "C"])]
    assert list(read_texts(sources)) == ["B", "A", "C"]


def test_a_hub_data_set_is_read_by_name_configuration_and_split(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict({"id": [1, 2, 3], "text": ["a", None, "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_texts("owner/name:small", split="dev")) == ["a", "b"]
    assert list(read_texts("name")) == ["a", "b"]
    assert calls == [(("owner/name", "small"), {"split": "dev"}), (("name", None), {"split": "train"})]
    with pytest.raises(ValueError, match=r"text_column='body' is not in name; the columns there are \['id', 'text'\]"):
        read_texts("name", text_column="body")


def test_a_hub_data_set_that_does_not_load_says_what_was_tried(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"source='corpus' is no file or folder here.*'train' from the Hub.*reach it"):
        read_texts("corpus")


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/no/such/folder", "a/b/c", "~/missing.csv"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match=r"source='.+' does not exist \(looked in"):
        read_texts(source)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", '{"id": 1, "body": "x"}\n'), ("a.csv", "id,body\n1,x\n"), ("a.parquet", None)],
)
def test_a_wrong_column_lists_the_columns_that_are_there(tmp_path, name, content):
    if content is None:
        write_parquet(tmp_path / name, id=[1], body=["x"])
    else:
        write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"text_column='text' is not in .*{name}.* there are \['id', 'body'\]"):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text .*iconv"),
        ("a.txt", " \n\t\n", "corpus .*a.txt.* is empty"),
        ("a.csv", "", r"text_column='text' is not in .*a.csv; the columns there are \[\]"),
        ("a.csv", "text,label\nno, no,0\n", "a.csv, line 2: the row has 3 fields, the header 2; quote the fields"),
        ("a.csv", "text,label\nno\n", "a.csv, line 2: the row has 1 fields, the header 2; quote the fields"),
        ("a.csv", 'text\n"no', "a.csv is not a CSV file in UTF-8 .*unexpected end"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv is not a CSV file in UTF-8 .*can't decode"),
        ("a.jsonl", '{"text": "x"}\n{"text"', "a.jsonl, line 2: not a line of JSON"),
        ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl, line 1: not a line of JSON"),
        ("a.jsonl", "[1]", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.jsonl", '{"text": 5}', "a.jsonl, line 1: text_column='text' holds int, expected text"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl, line 1: the text is not Unicode"),
        ("a.parquet", "no", "a.parquet is not a Parquet file"),
    ],
)
def test_a_bad_file_is_named_when_it_is_read(tmp_path, name, content, message):
    texts = read_texts(write(tmp_path / name, content))
    with pytest.raises(ValueError, match=message):
        list(texts)


def test_a_source_that_cannot_be_read_is_refused_before_reading(tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.pdf'; known file types are .txt, .jsonl, .csv, .parquet"):
        read_texts(write(tmp_path / "a.pdf", "x"))
    with pytest.raises(ValueError, match=r"holds no file that ends in .txt"):
        read_texts(tmp_path)
    with pytest.raises(ValueError, match="source is an empty list"):
        read_texts([])
    with pytest.raises(ValueError, match=r"sample_by='word' is unknown; choose one of \('document', 'line'\)"):
        read_texts(tmp_path, sample_by="word")


def test_the_fingerprint_changes_when_the_documents_may_have_changed(tmp_path):
    file = write(tmp_path / "a.txt", "x")
    os.utime(file, ns=(10, 10))
    first = read_texts(file).fingerprint
    assert read_texts(file).fingerprint == first
    assert read_texts(file, sample_by="line").fingerprint != first
    assert read_texts(file, text_column="body").fingerprint != first
    assert read_texts([file, file]).fingerprint != first
    os.utime(file, ns=(11, 11))
    assert read_texts(file).fingerprint == first  # of the content
    write(file, "xy")
    os.utime(file, ns=(10, 10))
    assert read_texts(file).fingerprint != first


def test_a_list_has_a_fingerprint_and_a_generator_has_none():
    assert text_fingerprint(["a", "b"]) == text_fingerprint(("a", "b")) != text_fingerprint(["ab"])
    assert text_fingerprint(Texts("x", "mark", ())) == "mark"
    with pytest.raises(TypeError, match="texts must be a list of strings or come from read_texts, found generator"):
        text_fingerprint(text for text in ["a"])
    with pytest.raises(TypeError, match="found str"):
        text_fingerprint("abc")
