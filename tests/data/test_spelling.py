"""The n-grams of characters of tokens against a loop that writes them out."""

import zlib

import numpy as np
import pytest

from bmtk.data.spelling import most_ngrams, spelled_tokens, spelling_table
from bmtk.data.tokenizers import train_tokenizer


def test_ngrams_of_three_to_six_characters_with_marked_ends_the_short_ones_first():
    ngrams = ["<ab", "abc", "bcd", "cd>", "<abc", "abcd", "bcd>", "<abcd", "abcd>", "<abcd>"]
    expected = [1 + zlib.crc32(ngram.encode()) % 1000 for ngram in ngrams]
    table = spelling_table(["abcd", None, "a", "\u4f60", "abcde"], 20, 1000)
    assert table.dtype == np.int32
    assert table[0].tolist() == [*expected, *[0] * 10]
    assert not table[1].any()
    assert (table[2:] > 0).sum(1).tolist() == [1, 1, 14]  # none of seven characters
    assert spelling_table(["abcd"], 4, 1000)[0].tolist() == expected[:4]


def test_every_number_is_that_of_a_row():
    table = spelling_table([f"word{number}" for number in range(100)], 30, 7)
    assert set(table[table > 0].tolist()) == set(range(1, 8))


def test_the_most_ngrams_are_those_of_the_longest_token():
    tokens = ["abcd", None, "a", "abcdefghi"]
    most = int((spelling_table(tokens, 99, 1000) > 0).sum(1).max())
    assert most_ngrams(tokens) == most == 30
    assert (most_ngrams(["a"]), most_ngrams([None]), most_ngrams([])) == (1, 0, 0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("byte_bpe", {"soup", " caf\u00e9", " \u4f60\u597d"}),
        ("uncased_word", {"soup", "caf\u00e9"}),
        ("wordpiece", {"soup", "##s"}),
    ],
)
def test_tokens_are_spelled_as_they_stand_in_texts(kind, words):
    tokenizer = train_tokenizer(
        ["soup soups caf\u00e9 \u4f60\u597d \u4f60\u597d caf\u00e9"] * 30, kind=kind, vocab_size=400
    )
    spelled = spelled_tokens(tokenizer)
    assert words <= set(spelled)
    assert len(spelled) == len(tokenizer)
    assert all(spelled[special] is None for special in tokenizer.all_special_ids)
