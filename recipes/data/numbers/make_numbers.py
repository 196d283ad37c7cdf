"""Write the made-up sentence pairs beside this file: python recipes/data/numbers/make_numbers.py

English sentences about numbers of things, and the same in a language that was invented for this file.  That language
says its verb first, a noun before its adjective and its number, and the ones of a number before the tens.
"""

import csv
import random
from pathlib import Path

ONES = {
    **{"one": "an", "two": "du", "three": "tir", "four": "fo", "five": "pim"},
    **{"six": "sek", "seven": "hep", "eight": "ok", "nine": "nun"},
}
TENS = {"twenty": "dumar", "thirty": "tirmar", "forty": "fomar", "fifty": "pimar", "sixty": "sekmar"}
NOUNS = {
    **{"birds": "avilo", "boats": "barko", "houses": "domalo"},
    **{"trees": "arvuro", "dogs": "kanilo", "stones": "petruso"},
}
ADJECTIVES = {"red": "ruji", "old": "vetti", "small": "mikki", "white": "blani", "green": "verdi"}
VERBS = {"see": "vidas", "follow": "sekvas", "hear": "audas", "like": "amas"}
SIZES = {"train": 1600, "validation": 100, "test": 100}


def number(draw: random.Random) -> tuple[str, str]:
    one, ten = draw.choice(list(ONES)), draw.choice(list(TENS))
    if draw.random() < 0.5:
        return one, ONES[one]
    return f"{ten} {one}", f"{ONES[one]} i {TENS[ten]}"


def things(draw: random.Random) -> tuple[str, str]:
    (count, counted), noun = number(draw), draw.choice(list(NOUNS))
    if draw.random() < 0.5:
        return f"{count} {noun}", f"{NOUNS[noun]} {counted}"
    adjective = draw.choice(list(ADJECTIVES))
    return f"{count} {adjective} {noun}", f"{NOUNS[noun]} {ADJECTIVES[adjective]} {counted}"


def sentences(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """`count` different pairs."""
    draw, pairs = random.Random(seed), {}
    while len(pairs) < count:
        (subject, their_subject), (thing, their_thing) = things(draw), things(draw)
        verb = draw.choice(list(VERBS))
        pairs[f"{subject} {verb} {thing}.".capitalize()] = f"{VERBS[verb]} {their_subject} {their_thing}.".capitalize()
    return list(pairs.items())


def main(folder: Path) -> None:
    rows = sentences(sum(SIZES.values()))
    for split, size in SIZES.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["english", "invented"])
            writer.writerows(rows[:size])
        rows = rows[size:]


if __name__ == "__main__":
    main(Path(__file__).parent)
