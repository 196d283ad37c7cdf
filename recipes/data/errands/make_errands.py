"""Write the made-up errands beside this file: python recipes/data/errands/make_errands.py

Every sentence is put together from the word lists below by a seeded draw.  Names of people and places share their
first halves.
"""

import json
import random
from pathlib import Path

HALVES = ["Al", "Ber", "Cor", "Dan", "El", "Fen", "Gar", "Hol", "Ing", "Jor", "Kel", "Lin"]
PERSON_ENDS = ["a", "ina", "o", "us"]
PLACE_ENDS = ["ton", "mouth", "ham", "dale"]
TITLES = ["", "Dr", "Aunt"]
SHAPES = [
    "{person} drove to {place} on Monday",
    "tell {person} that the parcel is in {place}",
    "the bus from {place} to {place} was late",
    "{person} and {person} met near {place} .",
    "is {person} still in {place} ?",
    "nobody was at the market today",
    "bring the keys to {person} , please",
    "in {place} it rained all week",
]
SIZES = {"train": 300, "validation": 60, "test": 60}


def name(kind: str, draw: random.Random) -> list[str]:
    if kind == "person":
        words = [draw.choice(TITLES), draw.choice(HALVES) + draw.choice(PERSON_ENDS)]
    else:
        words = [draw.choice(["", "", "North", "Old"]), draw.choice(HALVES) + draw.choice(PLACE_ENDS)]
    return [word for word in words if word]


def sentence(draw: random.Random) -> tuple[list[str], list[str]]:
    tokens, tags = [], []
    for word in draw.choice(SHAPES).split():
        kind = word.strip("{}")
        words = name(kind, draw) if word != kind else [word]
        tokens += words
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(words) - 1)] if word != kind else ["O"]
    return tokens, tags


def sentences(count: int, *, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """`count` different sentences: words, and their tags in IOB2."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        tokens, tags = sentence(draw)
        found[" ".join(tokens)] = (tokens, tags)
    return list(found.values())


def main(folder: Path) -> None:
    rows = sentences(sum(SIZES.values()))
    for split, size in SIZES.items():
        lines = [json.dumps({"tokens": tokens, "tags": tags}) for tokens, tags in rows[:size]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = rows[size:]


if __name__ == "__main__":
    main(Path(__file__).parent)
