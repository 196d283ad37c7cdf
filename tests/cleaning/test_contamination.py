"""Documents that share a long run of words with an evaluation set, against a plain search."""

import json
import random

import pytest

pytest.importorskip("datatrove", reason="needs the extra clean")

from datatrove.data import Document
from datatrove.utils.text import simplify_text

from bmtk.cleaning.arguments import DecontaminationRule
from bmtk.cleaning.contamination import decontamination, evaluation_sets, write_index
from bmtk.cleaning.words import Words

WORDS = [f"{a}{b}" for a in "bdfgklmn" for b in ("a", "e", "i", "o", "u")]  # without digits: all numbers count as one


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    words = Words().word_tokenize(simplify_text(text))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("n", [5, 8, 13])
def test_the_rule_finds_what_a_plain_search_finds(n, tmp_path):
    draw = random.Random(n)
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(2, 30))) for _ in range(30)]
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in questions))
    settings = DecontaminationRule(evaluation_sets=[f"quiz={path}"], evaluation_ngram=n)
    remarks = write_index(evaluation_sets(settings), settings, tmp_path / "index")
    num_short = sum(len(text.split()) < n for text in questions)
    remark = f"{num_short} of 30 texts of quiz have fewer than {n} words and are not looked for"
    assert remarks == ([remark] if num_short else [])
    documents = []
    for _ in range(60):
        words, copied = draw.choices(WORDS, k=30), draw.choice(questions).split()
        if draw.random() < 0.5:
            words[9:9] = copied[: draw.randint(1, len(copied))]
        documents.append(" ".join(words).upper() + "!")
    wanted = set().union(*(grams(text, n) for text in questions))
    expected = [not grams(text, n) & wanted for text in documents]
    rule = decontamination(settings, tmp_path / "index")
    assert [rule.filter(Document(text, "x")) is True for text in documents] == expected
    assert 10 < sum(expected) < 56


def test_columns_and_names_of_several_sets(tmp_path):
    rows = [{"question": "one two three four", "answer": "five six seven eight"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.txt").write_text("nine ten eleven twelve\n\n")
    sources = [f"qa={tmp_path / 'a.jsonl'}#question,answer", f"lines={tmp_path / 'b.txt'}"]
    settings = DecontaminationRule(evaluation_sets=sources, evaluation_ngram=4)
    assert write_index(evaluation_sets(settings), settings, tmp_path / "index") == []
    rule = decontamination(settings, tmp_path / "index")
    found = {}
    for text in ("x one two three four", "five six seven eight", "nine, ten eleven twelve", "one two three five"):
        doc = Document(text, "x")
        kept = rule.filter(doc) is True
        found[text] = None if kept else doc.metadata["contaminated_task"]
    assert list(found.values()) == ["qa", "qa", "lines", None]


def test_the_words_of_a_language_without_spaces_are_its_characters(tmp_path):
    (tmp_path / "a.txt").write_text("昨天下午，磨坊主在桥边修好了那座旧钟。\n", encoding="utf-8")
    settings = DecontaminationRule(evaluation_sets=[f"zh={tmp_path / 'a.txt'}"], evaluation_ngram=13)
    write_index(evaluation_sets(settings), settings, tmp_path / "index")
    rule = decontamination(settings, tmp_path / "index")
    assert rule.filter(Document("听说昨天下午磨坊主在桥边修好了那座旧钟了", "x")) == (False, "contaminated")
    assert rule.filter(Document("昨天下午，磨坊主在家里吃了一个梨。", "x")) is True
