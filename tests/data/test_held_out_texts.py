"""Validation text held out of a corpus: which parts, how much, and that nothing is lost or doubled."""

import pytest

from bmtk.data import corpus_files
from bmtk.data.held_out_texts import hold_out
from bmtk.data.sources import read_texts
from bmtk.errors import UserError


def corpus(tmp_path, text, **options):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return read_texts(path, **options)


def test_documents_are_held_out_whole_and_by_the_seed(tmp_path):
    lines = [f"line {number}" for number in range(50)]
    texts = corpus(tmp_path, "\n".join(lines), sample_by="line")
    found = hold_out(texts, 0.1, 1)
    assert len(list(found.validation)) == 5
    assert sorted([*found.train, *found.validation]) == sorted(lines)
    assert found.note == (
        "there is no validation text: 5 of 50 documents are held out (validation_fraction=0.1, seed 1)"
    )
    again, other = hold_out(texts, 0.1, 1), hold_out(texts, 0.1, 2)
    assert list(again.validation) == list(found.validation)
    assert again.validation.fingerprint == found.validation.fingerprint
    assert list(other.validation) != list(found.validation)
    marks = {part.fingerprint for one in (found, other) for part in (one.train, one.validation)}
    assert len(marks) == 4


def test_one_long_document_is_cut_at_blank_lines(tmp_path):
    blocks = [f"block {number}\n" + "word " * (number % 50) + "\n\n" for number in range(400)]
    found = hold_out(corpus(tmp_path, "".join(blocks)), 0.1, 0)
    pieces = [*found.train, *found.validation]
    assert sorted("".join(pieces).split("\n\n")) == sorted("".join(blocks).split("\n\n"))  # nothing lost or cut
    share = sum(map(len, found.validation)) / sum(map(len, blocks))
    assert share == pytest.approx(0.1, abs=0.03)
    assert "stretches of text, cut at blank lines, are held out" in found.note


def test_text_without_blank_lines_is_cut_at_lines_and_else_at_spaces(tmp_path):
    lines = hold_out(corpus(tmp_path, "".join(f"line {number}\n" for number in range(400))), 0.1, 0)
    assert "cut at ends of lines" in lines.note
    assert all(piece.endswith("\n") for piece in lines.train)
    words = hold_out(corpus(tmp_path, "word " * 500), 0.1, 0)
    assert "cut at spaces" in words.note
    assert "".join([*words.train, *words.validation]) == "word " * 500
    with pytest.raises(UserError, match="too short to hold out 10% of it for validation; name a text"):
        hold_out(corpus(tmp_path, "word"), 0.1, 0)


def test_of_a_large_corpus_every_document_has_its_own_chance(tmp_path):
    texts = corpus(tmp_path, "\n".join(map(str, range(5000))), sample_by="line")
    found = hold_out(texts, 0.1, 3)
    held = list(found.validation)
    assert 400 < len(held) < 600
    assert len(held) + len(list(found.train)) == 5000
    assert not set(held) & set(found.train)


@pytest.mark.parametrize("characters", [1, 7, 100])
def test_what_is_held_out_does_not_depend_on_how_a_file_is_read(tmp_path, monkeypatch, characters):
    blocks = [f"block {number} \n" + "word\n " * (number % 9) + "\n \n\n  " for number in range(300)]
    texts = corpus(tmp_path, "".join(blocks))
    whole = hold_out(texts, 0.1, 0)
    train, validation = list(whole.train), list(whole.validation)
    monkeypatch.setattr(corpus_files, "READ_CHARACTERS", characters)
    found = hold_out(texts, 0.1, 0)
    assert (list(found.train), list(found.validation), found.note) == (train, validation, whole.note)
