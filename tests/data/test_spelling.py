"""The n-grams of characters of tokens against a loop that writes them out."""

import zlib

import numpy as np

from bmtk.data.spelling import spelling_table


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
