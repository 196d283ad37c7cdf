"""Entities in sentences tagged with IOB1, IOB2 or BIOES, and precision, recall and F1 of two taggings.

The rules are those of the CoNLL-2003 scorer (conlleval), which read all three schemes and tolerate what no scheme
allows: an I- tag without a preceding entity begins one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from .labels import ratios

Entity = tuple[int, int, str]  # first word, one past the last, type


def is_scheme(tags: Iterable[str]) -> bool:
    """Whether the tags are O, or a type behind B-, I-, E- or S-; else they name the kinds of single words."""
    return all(tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-") and len(tag) > 2) for tag in tags)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sentence, in order; an empty tag is as good as O.

    >>> entities(["B-person", "I-person", "O", "I-place", "B-place"])
    [(0, 2, 'person'), (3, 4, 'place'), (4, 5, 'place')]
    """
    found: list[Entity] = []
    first, open_kind, previous = 0, "", "O"
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = ("O", "") if tag in ("O", "") else (tag[0], tag[2:])
        goes_on = mark in "IE" and previous in "BI" and kind == open_kind
        if open_kind and not goes_on:
            found.append((first, place, open_kind))
        if not goes_on:
            first, open_kind = place, kind
        previous = mark
    return found


def single_words(tags: Sequence[str]) -> list[Entity]:
    """Tags without a scheme: every word is an entity of its own, but for those whose tag is empty or O."""
    return [(place, place + 1, tag) for place, tag in enumerate(tags) if tag not in ("", "O")]


def agreement(truths: Sequence[Sequence[Entity]], found: Sequence[Sequence[Entity]]) -> dict[str, dict[str, float]]:
    """Exact matches by type, and of all under "": {"rows", "precision", "recall", "f1"}; 0 where a ratio has no cases.

    `truths` and `found` hold the entities of each sentence; rows are how many there are in truth.
    """
    in_truth: Counter[str] = Counter()
    in_found: Counter[str] = Counter()
    in_both: Counter[str] = Counter()
    for one, other in zip(truths, found, strict=True):
        for counts, spans in ((in_truth, one), (in_found, other), (in_both, set(one) & set(other))):
            for *_, kind in spans:
                counts[kind] += 1
                counts[""] += 1
    return {kind: ratios(in_both[kind], in_truth[kind], in_found[kind]) for kind in sorted({"", *in_truth, *in_found})}
