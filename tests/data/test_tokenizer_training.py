"""Tokenizers of a folder: the sample they are trained on, what is measured, and that others can load them."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

import bmtk_cli
from bmtk.data import tokenizer_samples
from bmtk.data.sources import read_texts
from bmtk.data.tokenizer_report import measure
from bmtk.data.tokenizer_samples import draw_sample, units_of
from bmtk.data.tokenizer_training import check_elsewhere
from bmtk.data.tokenizers import KINDS, train_tokenizer
from bmtk.errors import UserError
from bmtk.tasks import task_named

SAMPLES = Path(__file__).parents[2] / "recipes" / "data" / "languages"
TEXTS = ["We know what we are,\n  but know not! 中国 is 2.", "To be, or not to be?", "naïve 😀"] * 4


@pytest.mark.parametrize("kind", list(KINDS))
def test_measures_are_those_of_counting_by_hand(kind):
    tokenizer = train_tokenizer(TEXTS[:2], kind=kind, vocab_size=320)
    found = measure(tokenizer, TEXTS)
    ids = [number for text in TEXTS for number in tokenizer(text)["input_ids"]]
    words = [word for text in TEXTS for word in text.replace("中国", " 中 国 ").split()]
    assert (found.tokens, found.words) == (len(ids), len(words)) == (found.tokens, 80)
    assert found.num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.fertility == len(ids) / 80
    assert found.bytes_a_token == found.num_bytes / len(ids)
    assert found.vocabulary_used == len(set(ids)) / len(tokenizer)
    assert found.visible == sum(1 for text in TEXTS for character in text if not character.isspace())
    assert found.is_exact == all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)
    assert (kind in ("byte_bpe", "unigram", "bytes")) == (found.coverage == 1.0)


def test_coverage_counts_the_characters_of_unknown_tokens():
    word = train_tokenizer(["to be or"], kind="word", vocab_size=10)
    assert measure(word, ["to be unknown"]).coverage == 1 - 7 / 11
    char = train_tokenizer(["abc"], kind="char", vocab_size=10)
    assert measure(char, ["a b xyz"]).coverage == 1 - 3 / 5
    assert measure(ByT5Tokenizer(), ["any text"]).coverage == 1.0


def test_a_text_that_spells_a_special_token_is_measured_as_text():
    tokenizer = train_tokenizer(["abc"], kind="bytes", vocab_size=300)
    assert measure(tokenizer, ["<|endoftext|>"]).tokens == len("<|endoftext|>")


def test_long_texts_are_measured_in_pieces_with_the_same_tokens():
    draw = random.Random(1)
    text = " ".join(draw.choice(["be", "not\n", "question,", "that"]) for _ in range(40_000))
    tokenizer = train_tokenizer([text], kind="byte_bpe", vocab_size=300)
    found = measure(tokenizer, [text])
    assert found.tokens == len(tokenizer(text, verbose=False)["input_ids"])
    assert found.words == len(text.split())


def test_a_sample_is_the_units_with_the_smallest_marks():
    draw = random.Random(2)
    units = ["x" * draw.randrange(1, 40) + "é" for _ in range(500)]
    marks = [hashlib.blake2b(place.to_bytes(8, "little"), digest_size=8).digest() for place in range(500)]
    order = sorted(range(500), key=lambda place: int.from_bytes(marks[place], "little"))
    for wanted in (1, 700, 5000, 10**9):
        chosen, size = [], 0
        for place in order:
            if size >= wanted:
                break
            chosen.append(place)
            size += len(units[place].encode())
        found = draw_sample(iter(units), wanted)
        assert list(found) == [units[place] for place in sorted(chosen)]
        assert (found.num_bytes, found.corpus_bytes) == (size, sum(len(unit.encode()) for unit in units))
    assert str(draw_sample(["ab"] * 10**6, 10**6)).startswith("1.0 of 2.0 MB")


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_long_file_is_cut_into_units_that_train_the_same_tokenizer(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_samples, "PIECE_CHARACTERS", 40)
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) * 20)
    texts = read_texts(tmp_path / "a.txt")
    units = list(units_of(texts, kind))
    assert len(units) > 50
    assert "".join(units) == "".join(texts)
    whole, cut = (train_tokenizer(part, kind=kind, vocab_size=300) for part in (texts, units))
    assert cut.get_vocab() == whole.get_vocab()


def train(folder, *words):
    return bmtk_cli.main(["tokenizer", "train", "--output_dir", str(folder), *words])


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"words": f"Row {number} of the text, which is to be, or not to be."} for number in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return ["--train_file", str(path), "--text_column", "words"]


def test_the_command_trains_measures_and_says_what_is_next(tmp_path, corpus, capsys):
    words = ["--vocab_size", "300", "--special_tokens", "<|user|>", *corpus]
    assert train(tmp_path / "t", *words) == 0
    printed = capsys.readouterr().out
    assert "30 of 300 documents" in printed
    assert "in a clean process without bmtk, with the same ids" in printed
    assert f"next: bmtk pretrain --tokenizer {tmp_path / 't'} --train_file" in printed
    rows = json.loads((tmp_path / "t" / "tokenizer_report.json").read_text())
    assert list(rows) == ["held out", "sample: English", "sample: Chinese"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    text = (SAMPLES / "chinese.txt").read_text(encoding="utf-8")
    assert rows["sample: Chinese"]["tokens"] == len(tokenizer(text, verbose=False)["input_ids"])
    assert rows["held out"]["words"] == 30 * 13
    assert len(re.findall("^(?:held out|sample: ...nese|sample: English) .* yes$", printed, re.MULTILINE)) == 3

    assert train(tmp_path / "t", *words) == 0
    assert "holds this tokenizer already" in capsys.readouterr().out
    assert train(tmp_path / "t", *words, "--kind", "unigram") == 1
    assert "holds a tokenizer of another kind; choose another folder" in capsys.readouterr().err

    assert (
        bmtk_cli.main(["tokenizer", "show", str(tmp_path / "t"), "--text_file", corpus[1], "--text_column", "words"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "<|endoftext|> <|user|>" in shown
    assert "trained as byte_bpe on all of the training text" in shown
    assert re.search(r"^text_file +\d", shown, re.MULTILINE)

    task = task_named("causal_lm")  # the recipe holds out the same rows and trains the same tokenizer
    args = task.arguments(train_file=[corpus[1]], text_column="words", vocab_size=299)
    recipes = set(task.read(args, seed=42, folder=tmp_path / "run").tokenizer.get_vocab())
    assert recipes == tokenizer.get_vocab().keys() - {"<|user|>"}


def test_the_command_keeps_its_hands_off_other_folders(tmp_path, corpus, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("keep me")
    assert train(tmp_path / "mine", *corpus) == 1
    assert "holds no tokenizer of this command" in capsys.readouterr().err
    assert train(tmp_path / "new") == 2
    assert train(tmp_path / "new", *corpus, "--kind", "letters") == 1
    assert "kind='letters' is unknown" in capsys.readouterr().err
    assert train(tmp_path / "new", *corpus, "--sample_mb", "0") == 1
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_that_others_cannot_load_alike_is_refused(tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind="bytes", vocab_size=300)
    tokenizer.save_pretrained(tmp_path)
    other = train_tokenizer(TEXTS, kind="byte_bpe", vocab_size=300)
    with pytest.raises(UserError, match="gives other ids"):
        check_elsewhere(other, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded by AutoTokenizer"):
        check_elsewhere(tokenizer, tmp_path)
