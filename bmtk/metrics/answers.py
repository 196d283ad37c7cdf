"""How well an answer in words agrees with reference answers: exact match and F1, each the best over the references.

`words`: Rajpurkar et al. 2016, SQuAD 1.1: lower case, without punctuation and articles; F1 over the bag of words.
`characters`: Cui et al. 2019, CMRC 2018: lower case, without punctuation; Han characters and the words between them
are units, and F1 is over the longest run of units in common.  That scorer cuts words by NLTK, this one at blanks.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
HAN = re.compile(r"[\u4e00-\u9fff]")
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")
UNITS = re.compile(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+")


def agreement(answer: str, references: Sequence[str], *, by: str) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 of `answer`; `by` is "words" or "characters".

    >>> agreement("the Eiffel tower!", ["Eiffel Tower", "the tower"], by="words")
    (1.0, 1.0)
    """
    units_of, common = (_words, _bag_in_common) if by == "words" else (_characters, longest_run)
    found = units_of(answer)
    pairs = [(found, units_of(reference)) for reference in references]
    exact = max(float(one == other) for one, other in pairs)
    return exact, max(_f1(common(one, other), len(one), len(other)) for one, other in pairs)


def best_sentence(text: str, question: str, *, by: str) -> str:
    """The first of the sentences of `text` that have most units of the question; `by` as in `agreement`.

    >>> best_sentence("Tea is hot. The key is lost! Why?", "Where is the key?", by="words")
    'The key is lost!'
    """
    units_of = _words if by == "words" else _characters
    wanted = Counter(units_of(question))
    sentences = [sentence for sentence in SENTENCE.split(text) if sentence.strip()] or [text]
    return max(sentences, key=lambda sentence: (Counter(units_of(sentence)) & wanted).total())


def is_chinese(texts: Sequence[str]) -> bool:
    """Whether the texts hold more Han characters than words of other scripts."""
    units = [unit for text in texts for unit in UNITS.findall(text)]
    return 2 * sum(map(bool, map(HAN.fullmatch, units))) > len(units)


def longest_run(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest sequence of units, without gaps, that both hold."""
    best, ends = 0, [0] * (len(other) + 1)  # ends[j]: length of the run that ends here in one, and at j in other
    for unit in one:
        ends = [0, *(ends[j] + 1 if unit == match else 0 for j, match in enumerate(other))]
        best = max(best, *ends)
    return best


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def _characters(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if unicodedata.category(char)[0] not in "PS")
    return UNITS.findall(kept)


def _bag_in_common(one: Sequence[str], other: Sequence[str]) -> int:
    return (Counter(one) & Counter(other)).total()


def _f1(common: int, found: int, wanted: int) -> float:
    return 2 * common / (found + wanted) if common else 0.0
