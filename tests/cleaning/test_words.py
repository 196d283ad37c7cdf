"""Words and sentences without a model, in languages with and without spaces."""

import pickle

import pytest

pytest.importorskip("datatrove", reason="needs the extra clean")

from datatrove.utils.text import split_into_sentences, split_into_words
from datatrove.utils.word_tokenizers import load_word_tokenizer

from bmtk.cleaning.words import Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's a well-known fact, isn't it?", ["It's", "a", "well-known", "fact", ",", "isn't", "it", "?"]),
        ("“Naïve” café…", ["“", "Naïve", "”", "café", "…"]),
        ("昨天下雨。", ["昨", "天", "下", "雨", "。"]),
        ("BERT模型 v2", ["BERT", "模", "型", "v2"]),
        ("日本語のテスト", ["日", "本", "語", "の", "テ", "ス", "ト"]),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),  # a mark stays with its letter
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        (" \n\t", []),
    ],
)
def test_words(text, words):
    assert Words().word_tokenize(text) == words
    assert split_into_words(text, Words()) == words


def test_no_visible_character_is_lost():
    text = "Der 3. Weg – „gut“, 12,5 % (zwölf) 価格は¥100です。\n☃ a_b c++"
    assert "".join(Words().word_tokenize(text)) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." She left.', ['He said "no."', "She left."]),
        ("Version 1.5 is out. Get it", ["Version 1.5 is out.", "Get it"]),
        ("今天下雨。我们回家！好吗？", ["今天下雨。", "我们回家！", "好吗？"]),
        ("A title\nand a line.", ["A title", "and a line."]),
        ("... \n", ["..."]),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text, sentences):
    assert Words().sent_tokenize(text) == sentences
    assert [part.strip() for part in split_into_sentences(text, Words())] == sentences


def test_all_of_them_are_one_language_also_in_another_process():
    """datatrove keeps the last words by text and language, so that several rules split a text once."""
    other = pickle.loads(pickle.dumps(Words()))
    assert other == Words()
    assert load_word_tokenizer(other) == load_word_tokenizer(Words())
    assert split_into_words("a b", other) is split_into_words("a b", Words())
