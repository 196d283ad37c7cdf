"""A text read in windows that overlap, each after the question about it.  F windows, L positions, S answer spans."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Features, List, Value
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from bmtk.errors import UserError

from .texts import padded

NO_CHARACTER = -1  # the character offset of a token that is not of the text
COLUMNS = ("input_ids", "token_types", "char_starts", "char_ends", "spans")  # each a list of windows, or of spans


@dataclass(frozen=True)
class ContextWindows:
    """Cuts rows of "question" and "context" into windows of at most `longest` tokens.

    `num_types` is how many `token_type_ids` the model has.
    """

    tokenizer: PreTrainedTokenizerBase
    longest: int
    max_question_length: int
    stride: int
    num_types: int

    def check_room(self) -> None:
        """Raise UserError if windows are not longer than what they share."""
        room = self.longest - self.max_question_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= self.stride:
            raise UserError(
                f"max_length={self.longest} leaves {room} tokens of a text beside a question of "
                f"max_question_length={self.max_question_length}, but windows share stride={self.stride}; "
                "lower one of the two"
            )

    @staticmethod
    def features(of_rows: Features) -> Features:
        """Types of the columns of `of_rows` and of those that `encode` adds."""
        lists = {name: List(List(Value("int32"))) for name in COLUMNS}
        return Features({**of_rows, **lists, "length": Value("int64")})

    def encode(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """COLUMNS of each row, and "length", the tokens of all of its windows.

        "char_starts" and "char_ends" are the characters of the text that a token stands for, the end excluded,
        NO_CHARACTER for others; "spans" hold (window, first token, last token) of answers, if the rows have any.
        """
        encoded = self.tokenizer(
            self.shortened(batch["question"]),
            batch["context"],
            truncation="only_second",
            max_length=self.longest,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        found: dict[str, list[Any]] = {name: [[] for _ in batch["question"]] for name in COLUMNS}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            ids, sequence_ids = encoded["input_ids"][window], encoded.sequence_ids(window)
            offsets = [
                offset if sequence == 1 else (NO_CHARACTER,) * 2
                for offset, sequence in zip(encoded["offset_mapping"][window], sequence_ids, strict=True)
            ]
            pairs = (trimmed(batch["context"][row], *offset) for offset in offsets)
            starts, ends = map(list, zip(*pairs, strict=True))
            spans = answer_spans(batch, row, starts, ends)
            found["spans"][row] += [[len(found["input_ids"][row]), *span] for span in spans]
            types = token_types(ids, sequence_ids, num_types=self.num_types)
            for name, values in zip(COLUMNS, (ids, types, starts, ends), strict=False):
                found[name][row].append(values)
        return {**found, "length": [sum(map(len, windows)) for windows in found["input_ids"]]}

    def shortened(self, questions: list[str]) -> list[str]:
        """The questions as far as they are read."""
        encoded = self.tokenizer(
            questions,
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_question_length,
            return_offsets_mapping=True,
        )
        ends = [
            offsets[-1][1] if len(offsets) == self.max_question_length else None
            for offsets in encoded["offset_mapping"]
        ]
        return [question[:end] for question, end in zip(questions, ends, strict=True)]


@dataclass(frozen=True)
class PadWindows:
    """The windows of several questions in one batch.

    "question_of" (F,) is the question of each window; "char_starts" and "char_ends" (F, L) as `ContextWindows.encode`
    gives them; "labels" (S, 4) question, window, first and last token of each right answer; "contexts" the texts.
    """

    tokenizer: PreTrainedTokenizerBase
    num_types: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        windows = [window for row in rows for window in row["input_ids"]]
        batch = dict(self.tokenizer.pad({"input_ids": windows}, return_tensors="pt"))
        batch["attention_mask"] = padded([[1] * len(window) for window in windows], 0)
        if self.num_types:
            batch["token_type_ids"] = padded([window for row in rows for window in row["token_types"]], 0)
        for name in ("char_starts", "char_ends"):
            batch[name] = padded([window for row in rows for window in row[name]], NO_CHARACTER)
        batch["question_of"] = torch.tensor([question for question, row in enumerate(rows) for _ in row["input_ids"]])
        batch["contexts"] = [row["context"] for row in rows]
        if "starts" in rows[0]:
            before = np.cumsum([0, *(len(row["input_ids"]) for row in rows)]).tolist()
            labels = [
                [question, before[question] + window, *span]
                for question, row in enumerate(rows)
                for window, *span in row["spans"]
            ]
            batch["labels"] = torch.tensor(labels, dtype=torch.long).view(-1, 4)
        return batch


def separate_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make `tokenizer` put a token between question and text if it puts none, and shorten rows at their end."""
    tokenizer.truncation_side = "right"  # a question that is too long loses its end; of a text nothing is lost
    if not tokenizer.num_special_tokens_to_add(pair=True):
        mark = tokenizer.eos_token or tokenizer.pad_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A", pair=f"$A:0 {mark}:0 $B:1", special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark))]
        )


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The characters of a token without blanks at their ends, as several tokenizers count a blank to the next word.

    >>> trimmed("an answer", 2, 9)
    (3, 9)
    """
    piece = text[start:end] if start >= 0 else ""
    return (
        (start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip()))
        if piece.strip()
        else (start, end)
    )


def answer_spans(
    batch: dict[str, list[Any]], row: int, starts: Sequence[int], ends: Sequence[int]
) -> list[tuple[int, int]]:
    """First and last token of the answers to one row that are whole in a window, each once."""
    if "starts" not in batch:
        return []
    answers = zip(batch["starts"][row], batch["texts"][row], strict=True)
    found = sorted({(start, start + len(text)) for start, text in answers if start != NO_CHARACTER})
    spans = (span_of(start, end, starts, ends) for start, end in found)
    return list(dict.fromkeys(span for span in spans if span))


def span_of(start: int, end: int, starts: Sequence[int], ends: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last token of the characters [start, end); None if the window does not hold all of them.

    Where tokens reach beyond the answer, the fewest that hold it.
    """
    first = next((at for at, (a, b) in enumerate(zip(starts, ends, strict=True)) if 0 <= a <= start < b), None)
    last = next((at for at, (a, b) in enumerate(zip(starts, ends, strict=True)) if 0 <= a < end <= b), None)
    return None if first is None or last is None else (first, last)


def token_types(ids: Sequence[int], sequence_ids: Sequence[int | None], *, num_types: int) -> list[int]:
    """0: of the question, or a special token; 1: of the text; 1 + n: in a run of n that the question has, too.

    The longest run counts; 1 + n is `num_types` - 1 at most.
    """
    question = [token for token, sequence in zip(ids, sequence_ids, strict=True) if sequence == 0]
    types = [int(sequence == 1) for sequence in sequence_ids]
    for size in range(1, num_types - 1):
        runs = {tuple(question[at : at + size]) for at in range(len(question) - size + 1)}
        for at in range(len(ids) - size + 1):
            if all(types[at : at + size]) and tuple(ids[at : at + size]) in runs:
                types[at : at + size] = [1 + size] * size
    return [min(kind, max(num_types - 1, 0)) for kind in types]
