"""Entities, against readings made by hand of the three schemes."""

import pytest

from bmtk.metrics.entities import agreement, entities, is_scheme, single_words


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        # IOB2: every entity begins with B-
        ("B-a I-a O B-b", [(0, 2, "a"), (3, 4, "b")]),
        ("B-a B-a I-a", [(0, 1, "a"), (1, 3, "a")]),
        ("B-a B-b I-b", [(0, 1, "a"), (1, 3, "b")]),
        # IOB1: B- only between two entities of one type
        ("I-a I-a O I-b", [(0, 2, "a"), (3, 4, "b")]),
        ("I-a B-a I-a", [(0, 1, "a"), (1, 3, "a")]),
        ("I-a I-b I-b O", [(0, 1, "a"), (1, 3, "b")]),
        # BIOES: the last word is E-, a single word S-
        ("B-a I-a E-a S-a O S-b", [(0, 3, "a"), (3, 4, "a"), (5, 6, "b")]),
        ("B-a E-a B-a E-a", [(0, 2, "a"), (2, 4, "a")]),
        # what no scheme allows
        ("B-a I-b", [(0, 1, "a"), (1, 2, "b")]),
        ("O I-a I-a", [(1, 3, "a")]),
        ("E-a I-a", [(0, 1, "a"), (1, 2, "a")]),
        ("S-a I-a", [(0, 1, "a"), (1, 2, "a")]),
        ("B-a O I-a", [(0, 1, "a"), (2, 3, "a")]),
        ("O O", []),
        ("", []),
        ("B-a-b I-a-b", [(0, 2, "a-b")]),
    ],
)
def test_entities_are_read_from_their_tags(tags, expected):
    assert entities(tags.split()) == expected


def test_what_counts_as_a_scheme():
    assert is_scheme(["O", "B-person", "I-person", "S-x", "E-x"])
    assert not is_scheme(["NOUN", "VERB", "O"])
    assert not is_scheme(["B-", "O"])
    assert single_words(["NOUN", "VERB"]) == [(0, 1, "NOUN"), (1, 2, "VERB")]
    assert single_words(["O", "PER", "O", "LOC"]) == [(1, 2, "PER"), (3, 4, "LOC")]


def test_a_word_without_a_tag_is_no_entity_and_counts_nowhere():
    assert entities(["B-a", "", "I-a"]) == [(0, 1, "a"), (2, 3, "a")]
    scores = agreement([single_words(["NOUN", "VERB"])], [single_words(["NOUN", ""])])
    assert scores[""] == {"rows": 2, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}


def test_only_exact_matches_count_and_by_sentence():
    truths = [[(0, 2, "a"), (3, 4, "b")], [(0, 1, "a")], []]
    found = [[(0, 2, "a"), (3, 5, "b")], [(0, 1, "b")], [(0, 2, "a")]]
    scores = agreement(truths, found)
    assert scores["a"] == {"rows": 2, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2}
    assert scores["b"] == {"rows": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert scores[""] == {"rows": 3, "precision": 1 / 4, "recall": 1 / 3, "f1": pytest.approx(2 / 7)}
    assert agreement([[]], [[]]) == {"": {"rows": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}}
