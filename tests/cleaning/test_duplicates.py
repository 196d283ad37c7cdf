"""Equal and nearly equal documents, against plain Python: all pairs, signatures by hand, clusters by hand."""

import itertools
import json
import random
from hashlib import sha1
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra clean")

from datatrove.utils.text import simplify_text

from bmtk.cleaning.command import clean, read_settings
from bmtk.cleaning.words import Words

PRIME = (1 << 61) - 1
NGRAM, BUCKETS, HASHES, SEED = 5, 14, 8, 1
ENGLISH = ["".join(letters) for letters in itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst", "aeiou")]
CHINESE = [chr(0x4E00 + number) for number in range(3000)]


def shingles(text: str) -> set[str]:
    words = Words().word_tokenize(simplify_text(text))
    return {" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def signature(text: str) -> list[tuple[int, ...]]:
    """The least hash of all shingles, for each hash function, in buckets; products wrap at 2**64, as in datatrove."""
    draw = np.random.RandomState(SEED)
    factors = draw.randint(1, PRIME, dtype=np.uint64, size=(1, BUCKETS * HASHES))[0].tolist()
    added = draw.randint(0, PRIME, dtype=np.uint64, size=(1, BUCKETS * HASHES))[0].tolist()
    marks = [int.from_bytes(sha1(shingle.encode()).digest()[:8], "little") for shingle in shingles(text)]
    least = [min(((m * a + b) % 2**64) % PRIME for m in marks) for a, b in zip(factors, added, strict=True)]
    return [tuple(least[i : i + HASHES]) for i in range(0, len(least), HASHES)]


def clusters(texts: list[str]) -> list[set[int]]:
    """Documents that are connected by equal buckets."""
    signatures = [signature(text) for text in texts]
    groups = [{i} for i in range(len(texts))]
    for i, j in itertools.combinations(range(len(texts)), 2):
        if any(a == b for a, b in zip(signatures[i], signatures[j], strict=True)):
            one, other = (next(g for g in groups if k in g) for k in (i, j))
            if one is not other:
                groups = [g for g in groups if g is not one and g is not other] + [one | other]
    return groups


def pairs(draw: random.Random, words: list[str], joined: str) -> list[str]:
    """Texts of 120 words, each with a copy in which more words are others than in that of the text before."""
    found = []
    for changed in (1, 1, 2, 2, 4, 6, 9, 14, 20, 30, 60):
        text = draw.choices(words, k=120)
        copy = list(text)
        for place in draw.sample(range(120), changed):
            copy[place] = draw.choice(words)
        found += [joined.join(text), joined.join(copy)]
    return found


def kept(folder: Path, texts: list[str], rules: list[str]) -> list[int]:
    """The numbers of the texts that are left."""
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    argv = [
        "--input",
        str(source),
        "--output_dir",
        str(folder / "out"),
        "--output_format",
        "parquet",
        "--rules",
        *rules,
    ]
    clean(read_settings([*argv, "--workers", "1"], folder), lambda line: None)
    import pyarrow.parquet

    ids = pyarrow.parquet.read_table(folder / "out" / "documents" / "00000.parquet")["id"].to_pylist()
    return [int(name.rpartition("/")[2]) - 1 for name in ids]


@pytest.mark.parametrize(("words", "joined"), [(ENGLISH, " "), (CHINESE, "")], ids=["English", "Chinese"])
def test_one_document_of_each_cluster_of_near_duplicates_is_kept(words, joined, tmp_path, capsys):
    texts = pairs(random.Random(0), words, joined)
    left = kept(tmp_path, texts, ["near"])
    assert [len(group & set(left)) for group in clusters(texts)] == [1] * len(clusters(texts))
    removed, lines = set(range(len(texts))) - set(left), []
    for first in range(0, len(texts), 2):
        likeness, is_found = jaccard(texts[first], texts[first + 1]), bool({first, first + 1} & removed)
        lines.append(f"{likeness:.2f}{'-' if is_found else '+'}")
        assert is_found or likeness < 0.9
        assert not is_found or likeness > 0.4
    with capsys.disabled():
        print(f"\nJaccard of pairs (- one removed, + both kept): {' '.join(lines)}", end=" ")  # noqa: T201


def test_equal_documents_are_those_that_differ_in_white_space_alone(tmp_path):
    texts = ["a b c", "d e f", "a  b\nc", "a b c d", " a b c ", "A b c", "d e f"]
    assert kept(tmp_path, texts, ["exact"]) == [0, 1, 3, 5]


def test_short_documents_have_no_near_duplicates(tmp_path):
    assert kept(tmp_path, ["one two three", "one two three", "x"], ["near"]) == [0, 1, 2]


def test_both_rules_together_keep_one_of_equal_and_of_nearly_equal_documents(tmp_path):
    """Each rule keeps one of its own choice: asked about all documents at once they could remove every copy."""
    draw = random.Random(1)
    text = draw.choices(ENGLISH, k=200)
    copies = [" ".join(text)] * 3 + [" ".join([*text[:-1], "another"])] * 2 + [" ".join(draw.choices(ENGLISH, k=200))]
    left = kept(tmp_path, copies, ["exact", "near"])
    assert len(left) == 2
    assert left[1] == 5
