"""Write the made-up reviews beside this file: python recipes/data/reviews/make_reviews.py

Every sentence is put together from the word lists below by a seeded draw; the adjectives decide the label.
"""

import csv
import random
from pathlib import Path

PLACES = [
    "At the harbour",
    "On the second day",
    "In the old theatre",
    "After the rain",
    "Near the station",
    "This time",
]
THINGS = [
    "soup",
    "concert",
    "room",
    "guide",
    "train",
    "garden",
    "lecture",
    "bread",
    "film",
    "boat trip",
    "map",
    "view",
]
ADJECTIVES = {
    "positive": [
        "delightful",
        "warm",
        "generous",
        "fresh",
        "clever",
        "charming",
        "bright",
        "splendid",
        "kind",
        "lovely",
    ],
    "negative": ["dreadful", "cold", "stingy", "stale", "dull", "rude", "gloomy", "awful", "dirty", "tiresome"],
}
JOINTS = [" and the", ", while the", "; even the", " because the"]
SIZES = {"train": 320, "validation": 40, "test": 40}


def sentences(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different (text, label) pairs, half of them positive, in a shuffled order."""
    draw, texts = random.Random(seed), {}
    while len(texts) < count:
        label = ("positive", "negative")[len(texts) % 2]
        first, second = draw.sample(THINGS, 2)
        one, other = draw.sample(ADJECTIVES[label], 2)
        place, joint = draw.choice(PLACES), draw.choice(JOINTS)
        texts[f"{place} the {first} was {one}{joint} {second} was {other}."] = label
    rows = list(texts.items())
    draw.shuffle(rows)
    return rows


def main(folder: Path) -> None:
    rows = sentences(sum(SIZES.values()))
    for split, size in SIZES.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows(rows[:size])
        rows = rows[size:]


if __name__ == "__main__":
    main(Path(__file__).parent)
