"""Sentences as tokens: where their words begin, and windows of those that are too long for the model.

W windows, L tokens.  The first token of a word carries the word's tag; a word that is in several windows is predicted
in the one that has most context around it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from bmtk.data.packing import IGNORE_INDEX

from .texts import pad_texts, padded

MISSING = -1  # the position of a word that has no token
PADDING = -2  # fills up the positions of words
SPECIAL = (-1, -1)  # the span of a token that is not of the sentence

Span = tuple[int, int]  # the characters of a token


@dataclass(frozen=True)
class SentenceEncoder:
    """A batch of lists of words as tokens: those of all windows of a sentence, one window after the other.

    "windows" are the lengths of a sentence's windows, "positions" those of its words' first tokens among all of them.
    Of rows with tags ("label") "truth" are the ids of words, and "labels" of all tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    separator: str  # between words
    max_length: int  # tokens of a window
    stride: int  # tokens that two windows share
    ids: Mapping[str, int]  # of tags

    def __call__(self, batch: dict[str, list[list[str]]]) -> dict[str, list[Any]]:
        encoded = self.tokenizer(
            [self.separator.join(words) for words in batch["words"]],
            truncation=True,
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        tokens = [name for name in encoded if name in self.tokenizer.model_input_names]
        found: dict[str, list[Any]] = {name: [[] for _ in batch["words"]] for name in (*tokens, "windows", "spans")}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            marks = zip(encoded["offset_mapping"][window], encoded["special_tokens_mask"][window], strict=True)
            found["windows"][row].append(len(encoded["input_ids"][window]))
            found["spans"][row].append([SPECIAL if is_special else span for span, is_special in marks])
            for name in tokens:
                found[name][row] += encoded[name][window]
        pairs = zip(batch["words"], found.pop("spans"), strict=True)
        positions = [positions_in_windows(*pair, self.separator, self.stride) for pair in pairs]
        if "label" in batch:
            found["truth"] = [[self.ids[tag] for tag in tags] for tags in batch["label"]]
            rows = zip(positions, found["truth"], map(len, found["input_ids"]), strict=True)
            found["labels"] = [labels_of_tokens(*row) for row in rows]
        return {**found, "positions": positions}


def positions_of_words(words: Sequence[str], spans: Sequence[Span], separator: str) -> list[int]:
    """The position of the first token that begins in each word (blanks before it do not count), or MISSING.

    `spans` are the characters of each token in the words joined by `separator`; SPECIAL for a special token.
    """
    owners: list[int | None] = []  # of each character: the word that it is of
    for number, word in enumerate(words):
        owners += [number] * len(word) + ([None] * len(separator) if number < len(words) - 1 else [])
    text, positions = separator.join(words), [MISSING] * len(words)
    for position, (start, end) in enumerate(spans):
        first = next((at for at in range(max(start, 0), end) if not text[at].isspace()), None)
        owner = None if first is None else owners[first]
        if owner is not None and positions[owner] == MISSING:
            positions[owner] = position
    return positions


def positions_in_windows(
    words: Sequence[str], windows: Sequence[Sequence[Span]], separator: str, stride: int
) -> list[int]:
    """The position of each word's first token among those of all `windows`, one after the other, or MISSING.

    A window is the spans of its tokens; neighbours share `stride` of those that are not special.  Of a word that is in
    several, the position is taken that has most tokens between it and where its window was cut off.
    """
    firsts: list[int] = []  # of each window: the number of its first token in the sentence
    positions: list[list[int]] = []  # of each window: where its tokens are that are not special
    spans: list[Span] = []  # of the sentence
    before = 0
    for window in windows:
        own = [position for position, span in enumerate(window) if span != SPECIAL]
        shared = stride if firsts else 0
        firsts.append(len(spans) - shared)
        positions.append([before + position for position in own])
        spans += [window[position] for position in own[shared:]]
        before += len(window)
    last = len(windows) - 1

    def best(token: int) -> int:
        context = {}
        for number, (first, own) in enumerate(zip(firsts, positions, strict=True)):
            left, right = token - first, first + len(own) - 1 - token
            if left >= 0 and right >= 0:
                # Where the sentence itself begins or ends, nothing was cut off.
                nearest = min(left if number else len(spans), right if number < last else len(spans))
                context[own[left]] = nearest
        return max(context, key=lambda position: context[position])

    return [MISSING if token == MISSING else best(token) for token in positions_of_words(words, spans, separator)]


def labels_of_tokens(positions: Sequence[int], tags: Sequence[int], length: int) -> list[int]:
    """The tag at the first token of each word; IGNORE_INDEX elsewhere.

    >>> labels_of_tokens([0, 3, -1], [7, 8, 9], 5)
    [7, -100, -100, 8, -100]
    """
    labels = [IGNORE_INDEX] * length
    for position, tag in zip(positions, tags, strict=True):
        if position != MISSING:
            labels[position] = tag
    return labels


@dataclass(frozen=True)
class PadSentences:
    """The windows of several sentences, padded as the tokenizer does.

    "labels" (W, L), IGNORE_INDEX where no word begins; "sizes" (B,): tokens of each sentence, whose windows follow
    each other; "positions" and "truth" (B, words) of each word, filled up with PADDING and IGNORE_INDEX.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in rows[0] if name in self.tokenizer.model_input_names]
        parts = ([part for row in rows for part in in_parts(row[name], row["windows"])] for name in names)
        windows = [dict(zip(names, window, strict=True)) for window in zip(*parts, strict=True)]
        batch = pad_texts(self.tokenizer, windows, return_attention_mask=True)
        batch["sizes"] = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["positions"] = padded([row["positions"] for row in rows], PADDING)
        if "labels" in rows[0]:
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
            batch["labels"][batch["attention_mask"].bool()] = torch.tensor([x for row in rows for x in row["labels"]])
            batch["truth"] = padded([row["truth"] for row in rows], IGNORE_INDEX)
        return batch


def in_parts(values: Sequence[Any], lengths: Sequence[int]) -> list[Sequence[Any]]:
    """`values` in consecutive parts of these lengths."""
    ends = list(accumulate(lengths))
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]
