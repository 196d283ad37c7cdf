"""Write a made-up crawl with planted faults beside this file: python recipes/data/web_text/make_web_text.py

Every page is put together from the word lists below by a seeded draw.  `faults.json` says what is wrong with which
page, so that what a cleaning removes can be compared with what it should.
"""

import gzip
import json
import random
from pathlib import Path

PEOPLE = [
    "the miller",
    "her aunt",
    "a young clerk",
    "the ferryman",
    "our neighbour",
    "the schoolmaster",
    "an old sailor",
]
PEOPLE += ["the gardener", "two sisters", "the baker", "a travelling doctor", "the night watchman", "most farmers"]
ACTS = ["repaired", "carried home", "described", "sold", "remembered", "painted", "hid", "borrowed", "inspected"]
ACTS += ["gave away", "counted", "washed", "lost", "promised", "ordered", "weighed", "forgot", "admired"]
THINGS = ["the broken clock", "a basket of pears", "seven copper kettles", "the harbour map", "an unfinished letter"]
THINGS += [
    "a pair of winter boots",
    "the parish register",
    "some dried herrings",
    "the heavy oak door",
    "a brass lantern",
]
THINGS += ["three sacks of flour", "the garden bench", "a blue umbrella", "the church bell", "every spare candle"]
PLACES = ["behind the mill", "near the old bridge", "at the market", "on the way to the coast", "in the cellar"]
PLACES += ["outside the bakery", "between two hay wagons", "at the foot of the hill", "along the southern wall"]
PLACES += [
    "under the chestnut trees",
    "beside the canal",
    "within the city walls",
    "by the lighthouse",
    "in a narrow lane",
]
TIMES = ["Last winter", "Before the storm", "On Tuesday", "After supper", "In those years", "Towards evening", "Once"]
TIMES += ["During the fair", "When the snow had melted", "Early in March", "At noon", "While it rained"]
ENDS = [
    "and nobody asked why",
    "which surprised the whole village",
    "though it was of little use",
    "with great patience",
]
ENDS += ["because the road was closed", "and wrote it down", "as was the custom", "for half of the usual price"]
ENDS += ["while the children watched", "as if it were nothing", "and kept the receipt", "until the lamps went out"]
ENDS += ["to be ready for the spring", "without a word", "that the others had left", "and be gone by dawn"]
OPENINGS = ["It is often told that", "We have heard that", "Few people believe that", "The letters show that"]
OPENINGS += [
    "Nobody could explain how",
    "It was said to have begun when",
    "The story goes that",
    "Records have it that",
]

GERMAN = ["Der Müller reparierte gestern die alte Uhr hinter der Kirche.", "Im Winter war der Weg zum Hafen gesperrt."]
GERMAN += [
    "Niemand wusste, warum die Glocke in der Nacht geläutet hatte.",
    "Die Kinder sammelten Birnen unter den Bäumen.",
]
GERMAN += [
    "Nach dem Essen schrieb sie einen langen Brief an ihre Tante.",
    "Auf dem Markt gab es frisches Brot und Käse.",
]
CHINESE = [
    "昨天下午，磨坊主在桥边修好了那座旧钟。",
    "冬天的时候，通往港口的路被大雪封住了。",
    "没有人知道钟声为什么在夜里响起。",
]
CHINESE += ["孩子们在栗子树下捡了一篮梨。", "晚饭以后，她给姑妈写了一封长信。", "市场上有新鲜的面包和奶酪。"]
QUOTES = [
    "“It’s the café’s finest crème brûlée, she said — and naïve tourists agreed",
    "The façade of the château was déjà vu",
]
FOREIGN = 5  # pages of each other language
PLANTED = 5  # pages of every other fault
NUM_PAGES = 120  # without fault


class Words:
    """Draws the words of one page: no place and no end twice, so that pages do not repeat themselves."""

    def __init__(self, draw: random.Random):
        self.draw = draw
        self.places, self.ends = draw.sample(PLACES, len(PLACES)), draw.sample(ENDS, len(ENDS))

    def sentence(self) -> str:
        draw = self.draw
        who, act, what = draw.choice(PEOPLE), draw.choice(ACTS), draw.choice(THINGS)
        place, end = self.places.pop(), self.ends.pop()
        if draw.random() < 0.5:
            return f"{draw.choice(TIMES)} {who} {act} {what} {place}, {end}."
        return f"{draw.choice(OPENINGS)} {who} {act} {what} {place} {end}."


def sentence(draw: random.Random) -> str:
    return Words(draw).sentence()


def page(draw: random.Random) -> str:
    """Two or three paragraphs of three or four sentences, each paragraph on a line."""
    words = Words(draw)
    paragraphs = [" ".join(words.sentence() for _ in range(draw.randint(3, 4))) for _ in range(draw.randint(2, 3))]
    return "\n".join(paragraphs)


def question(draw: random.Random) -> str:
    first, second = draw.sample(PLACES, 2)
    return (
        f"A cart leaves {first} with {draw.randint(20, 90)} barrels and loses {draw.randint(2, 9)} of them at every "
        f"bend of the road, so how many of them arrive {second} if there are {draw.randint(2, 5)} bends on the way"
    )


def with_inserted(draw: random.Random, text: str, words: str) -> str:
    """The text with a sentence put between two of its own."""
    sentences = text.split(". ")
    place = draw.randrange(1, len(sentences))
    return ". ".join([*sentences[:place], words, *sentences[place:]])


def nearly(draw: random.Random, text: str) -> str:
    """The text with one word in the middle and the last sentence changed."""
    words = text.split(" ")
    words[len(words) // 2] = "suddenly"
    return " ".join(words[:-2]) + " at last."


def phone(draw: random.Random) -> str:
    shapes = ["+49 30 55{}", "(555) 234-{}", "+1 555 867 {}", "+44 20 7946 {}"]
    return draw.choice(shapes).format(draw.randint(1000, 9999))


def secret(draw: random.Random) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    return "AKIA" + "".join(draw.choice(letters) for _ in range(9)) + "EXAMPLE"  # a shape that is known to be no key


def address(draw: random.Random) -> str:
    return f"{draw.choice([8, 62, 91, 151])}.{draw.randint(1, 250)}.{draw.randint(1, 250)}.{draw.randint(1, 250)}"


def removed_pages(draw: random.Random, clean: list[str], questions: list[str]) -> dict[str, list[str]]:
    """Pages that a cleaning removes, by the rule that should."""
    nouns = (
        "clock pears kettles harbour map letter boots winter register door lantern flour bench umbrella bell".split()
    )
    short = [
        "The miller slept well.",
        "It rained on the coast.",
        "She was tired of it.",
        "He ate bread.",
        "A long road.",
    ]
    labels = [f"The {draw.choice(['red', 'old', 'tall', 'grey'])} {thing.split()[-1]}." for thing in THINGS]
    return {
        "language": [" ".join(draw.choices(words, k=12)) for words in (GERMAN, CHINESE) for _ in range(FOREIGN)],
        "length": short[:PLANTED],
        "repetition": ["\n".join([page(draw), *[sentence(draw)] * 8]) for _ in range(PLANTED)],
        "gopher": [
            " ".join(word for _ in range(6) for word in draw.sample(nouns, len(nouns))) for _ in range(PLANTED)
        ],
        "c4": [page(draw) + "\nThis part of the page holds {{ template }} marks." for _ in range(PLANTED)],
        "fineweb": ["\n".join([sentence(draw), *draw.sample(labels, 12), sentence(draw)]) for _ in range(PLANTED)],
        "decontaminate": [with_inserted(draw, page(draw), draw.choice(questions)) for _ in range(PLANTED)],
        "exact": clean[:PLANTED],
        "near": [nearly(draw, text) for text in clean[PLANTED : 2 * PLANTED]],
    }


def changed_pages(draw: random.Random) -> dict[str, list[str]]:
    """Pages that a cleaning keeps when it has repaired or scrubbed them."""
    broken = [quote.encode("utf-8").decode("windows-1252") for quote in QUOTES]
    return {
        "unicode": [with_inserted(draw, page(draw), draw.choice(broken)) for _ in range(PLANTED)],
        "email": [
            with_inserted(draw, page(draw), f"Write to anna.{n}@mill-house.example.org to order")
            for n in range(PLANTED)
        ],
        "phone": [with_inserted(draw, page(draw), f"Call {phone(draw)} for a table") for _ in range(PLANTED)],
        "ip": [
            with_inserted(draw, page(draw), f"The lighthouse answers at {address(draw)} by night")
            for _ in range(PLANTED)
        ],
        "key": [
            with_inserted(draw, page(draw), f"The clerk wrote {secret(draw)} on the wall") for _ in range(PLANTED)
        ],
    }


def make(folder: Path) -> None:
    """Write the pages, in an order that the seed decides, the questions that were planted, and what is wrong."""
    draw = random.Random(0)
    questions = [question(draw) for _ in range(20)]
    clean = [page(draw) for _ in range(NUM_PAGES)]
    # Copies come last, so that the first of equal pages is the one without a fault.
    early = [("", text) for text in clean]
    early += [(fault, text) for fault, texts in changed_pages(draw).items() for text in texts]
    planted = [(rule, text) for rule, texts in removed_pages(draw, clean, questions).items() for text in texts]
    early += [(rule, text) for rule, text in planted if rule not in ("exact", "near")]
    draw.shuffle(early)
    pages = [*early, *((rule, text) for rule, text in planted if rule in ("exact", "near"))]
    halves = {"pages-1.jsonl.gz": pages[: len(pages) // 2], "pages-2.jsonl.gz": pages[len(pages) // 2 :]}
    for name, rows in halves.items():
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in rows)
        (folder / name).write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
    faults = {f"{name}/{n}": fault for name, rows in halves.items() for n, (fault, _) in enumerate(rows, 1) if fault}
    (folder / "faults.json").write_text(json.dumps(faults, indent=1) + "\n", encoding="utf-8")
    rows = "".join(json.dumps({"question": text, "answer": "yes"}) + "\n" for text in questions)
    (folder / "quiz.jsonl").write_text(rows, encoding="utf-8")


if __name__ == "__main__":
    make(Path(__file__).parent)
