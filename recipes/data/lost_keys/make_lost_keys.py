"""Write the made-up questions beside this file: python recipes/data/lost_keys/make_lost_keys.py

Every text says of a few things where they are; the question asks for one of them.
"""

import json
import random
from pathlib import Path

OWNERS = ["Ada", "Boris", "Chen", "Dilek", "Emil", "Farah"]
THINGS = ["key", "coat", "ticket", "lamp", "violin", "letter", "bicycle", "cup"]
PLACES = [
    "old attic",
    "kitchen",
    "blue box",
    "garden shed",
    "hall",
    "third drawer",
    "car",
    "library",
    "left pocket",
    "well",
]
VERBS = ["is", "lies", "was left", "must be"]
SIZES = {"train": 500, "validation": 60, "test": 60}


def question(draw: random.Random) -> dict[str, object]:
    pairs = draw.sample([(owner, thing) for owner in OWNERS for thing in THINGS], 3)
    places = draw.sample(PLACES, 3)
    asked, context = draw.randrange(3), ""
    for number, ((owner, thing), place) in enumerate(zip(pairs, places, strict=True)):
        sentence = f"The {thing} of {owner} {draw.choice(VERBS)} in the "
        if number == asked:
            start = len(context) + len(sentence)
        context += f"{sentence}{place}. "
    owner, thing = pairs[asked]
    answers = {"text": [places[asked]], "answer_start": [start]}
    return {"question": f"Where is the {thing} of {owner}?", "context": context.strip(), "answers": answers}


def main(folder: Path, *, seed: int = 0) -> None:
    draw = random.Random(seed)
    for split, size in SIZES.items():
        lines = [json.dumps({"id": f"{split}-{row}", **question(draw)}) for row in range(size)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
