"""Names that stand for several files."""

import pytest

from bmtk.data.patterns import is_pattern, matching_files, without_braces
from bmtk.data.sources import read_texts
from bmtk.data.tables import read_all, read_splits
from bmtk.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{b,a,}-{0..1}", ["b-0", "b-1", "a-0", "a-1", "-0", "-1"]),
        ("{x}.csv", ["{x}.csv"]),
        ("plain.csv", ["plain.csv"]),
    ],
)
def test_braces_are_those_of_a_shell(name, expected):
    assert without_braces(name) == expected
    assert is_pattern(name) == (expected != [name])


def write(folder, names):
    for number, name in enumerate(names):
        (folder / name).write_text(f"text,label\nt{number},a\n")


def test_the_files_of_a_pattern_come_in_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ["b1.csv", "a1.csv", "a0.csv", "a0.md", "[x].csv", "{1,2}.csv"])
    assert list(map(str, matching_files("{b,a}*", [".csv"], option="it"))) == ["b1.csv", "a0.csv", "a1.csv"]
    for name in ("[x].csv", "{1,2}.csv"):  # names of files that are there
        assert list(map(str, matching_files(name, [".csv"], option="it"))) == [name]
    with pytest.raises(UserError, match=r"it='c\*' matches no file that ends in \.csv"):
        matching_files("c*", [".csv"], option="it")


def test_tables_and_corpora_are_named_by_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ["part-0.csv", "part-1.csv", "train-0.csv", "val-0.csv", "val-1.csv"])
    whole = read_splits("part-{0..1}.csv", files={})
    assert {split: rows["text"][:] for split, rows in whole.items()} == {"train": ["t0", "t1"]}
    named = read_splits("{train,val}-*.csv", files={})
    assert {split: rows["text"][:] for split, rows in named.items()} == {"train": ["t2"], "validation": ["t3", "t4"]}
    one = read_splits(None, files={"train": ["part-*.csv"], "test": ["val-{1,0}.csv"]})
    assert {split: rows["text"][:] for split, rows in one.items()} == {"train": ["t0", "t1"], "test": ["t4", "t3"]}
    assert read_all("part-*.csv", option="input")["text"][:] == ["t0", "t1"]
    assert list(read_texts("part-{1,0}.csv")) == ["t1", "t0"]
    with pytest.raises(UserError, match=r"files that are named after a split and others that are not, such as part-0"):
        read_splits("*.csv", files={})
    with pytest.raises(FileNotFoundError, match=r"part-2\.csv does not exist"):
        read_splits("part-{0..2}.csv", files={})
