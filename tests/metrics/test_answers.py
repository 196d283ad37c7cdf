"""Agreement of answers, against values worked out by the rules of the SQuAD 1.1 and CMRC 2018 scorers by hand."""

import difflib
import random

import pytest

from bmtk.metrics.answers import agreement, best_sentence, is_chinese, longest_run


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel  tower"], 1, 1),
        ("an apple a day", ["apple day"], 1, 1),
        ("theatre", ["the atre"], 0, 0),
        ("in Paris", ["Paris", "Paris, France"], 0, 2 / 3),  # precision 1/2, recall 1
        ("to be to be", ["to be"], 0, 2 / 3),  # a word counts as often as it occurs in both
        ("U.S.", ["US"], 1, 1),
        ("rock-n-roll", ["rock n roll"], 0, 0),
        ("", ["x"], 0, 0),
        ("the", ["a"], 1, 0),  # both are nothing: the scorer's F1 of no common word is 0
    ],
)
def test_words_are_compared_as_squad_does(answer, references, exact, f1):
    assert agreement(answer, references, by="words") == (exact, pytest.approx(f1))


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("《北京》。", ["北京"], 1, 1),
        ("北京市", ["北京"], 0, 4 / 5),  # two characters in common of 3 and 2
        ("京北", ["北京"], 0, 1 / 2),  # in a run
        ("光荣和ω-Force", ["ω-force"], 0, 2 / 5),  # 光 荣 和 ωforce
        ("1998年", ["1998年5月"], 0, 2 * 2 / 6),  # 1998 年 / 1998 年 5 月
        ("上海", ["北京", "上海市"], 0, 4 / 5),
        ("", ["北京"], 0, 0),
    ],
)
def test_characters_are_compared_as_cmrc_does(answer, references, exact, f1):
    assert agreement(answer, references, by="characters") == (exact, pytest.approx(f1))


def test_the_longest_run_is_that_of_difflib():
    draw = random.Random(0)
    for _ in range(200):
        one, other = ("".join(draw.choices("abc", k=draw.randrange(12))) for _ in range(2))
        expected = difflib.SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size
        assert longest_run(one, other) == expected


@pytest.mark.parametrize(
    ("text", "question", "by", "expected"),
    [
        (
            "Tea is hot. The key is under 1.5 stones! Why?",
            "Where is the key?",
            "words",
            "The key is under 1.5 stones!",
        ),
        ("茶很热。钥匙在石头下面。还有茶。", "钥匙在哪里", "characters", "钥匙在石头下面。"),
        ("one\ntwo\n", "Nothing of it", "words", "one"),
        ("", "Where?", "words", ""),
    ],
)
def test_the_best_sentence_has_most_of_the_question(text, question, by, expected):
    assert best_sentence(text, question, by=by) == expected


def test_the_script_decides_how_answers_are_compared():
    assert is_chinese(["本作以三大故事为主轴", "from 2010 on"])
    assert not is_chinese(["the character 中 means middle"])
