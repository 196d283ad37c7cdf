"""Token classification: a tag for every word of a sentence.  Precision, recall and F1 of exact entities.

A sentence is its words with `word_separator` between them, as `pipeline` reads it; the first token of a word carries
the word's tag, and no other token is learned from or asked.  A sentence that is too long for the model is read in
windows that overlap, and each word asked in the window that shows most around it.  B sentences, W windows, L tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from bmtk.data.labels import label_name
from bmtk.data.tables import check_column
from bmtk.metrics.entities import Entity, agreement, entities, is_scheme, single_words
from bmtk.settings import setting

from .classification import Classification, ClassificationArguments
from .figures import confusion_matrix
from .label_types import scores_table
from .task import Prediction, mean_loss, spread_and_worst
from .texts import TextArguments, TextTask, pad_texts, padded

UNSEEN = -1  # in place of a position: the word has no token; in place of a tag: none was found
NO_WORD = -2  # pads the places of words
NOT_ASKED = -100  # pads labels, and stands where no word begins
SPECIAL = (-1, -1)  # the span of a token that is not of the sentence
NOT_READ = frozenset(("labels", "places", "sizes", "truth"))  # what of a batch is not for the model
NOTHING = "nothing"


@dataclass
class TokenClassificationArguments(TextArguments, ClassificationArguments):
    """Which words and tags, and how many tokens of a sentence are read."""

    _argument_group_name = "data of token_classification"

    token_column: str = setting("tokens", "column of the words: lists, or texts with blanks between words")
    label_column: str = setting("tags", "column of the tags, one for each word: IOB1, IOB2, BIOES, or plain labels")
    word_separator: str = setting(" ", "what stands between two words of a sentence; for Chinese characters: ''")
    stride: int | None = setting(
        None, "tokens that two windows share, of a sentence longer than max_length; default: a quarter of a window"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_lengths()
        if self.stride is not None and self.stride < 0:
            raise ValueError(f"stride={self.stride} must be at least 0 tokens")


class TokenClassification(TextTask, Classification):
    """Sentences in words, and a tag for each of them."""

    name = "token_classification"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "token-classification",
        "auto_class": "AutoModelForTokenClassification",
        "noun": "tagger",
        "limits": "It knows only the tags it was trained with. Expect lower accuracy on text that differs from its "
        "training data, and on names that do not occur there.",
    }
    arguments = TokenClassificationArguments
    auto_class = AutoModelForTokenClassification
    peft_task_type = "TOKEN_CLS"
    metrics = ("loss", "precision", "recall", "f1", "accuracy")
    main_metric = "f1"
    inputs = ("words",)

    # ------------------------------------------------------------------------------------------------ rows

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Columns "words" and "label" (tags), lists of strings; sentences without words are left out if labelled."""
        words = self._lists(table, self.args.token_column, "token_column", where)
        if not labelled:
            return Dataset.from_dict({"words": words})
        tags = self._tags(table, where)
        for row, (one, other) in enumerate(zip(words, tags, strict=True), 1):
            if len(one) != len(other):
                raise ValueError(f"{where} row {row} has {len(one)} words and {len(other)} tags; each word needs one")
        rows = Dataset.from_dict({"words": words, "label": tags})
        joined = [" ".join(row) for row in words]
        return self.keep_rows_with_text(rows, joined, option="token_column", where=where)

    def _lists(self, table: Dataset, column: str, option: str, where: str) -> list[list]:
        check_column(table, column, option=option, where=where)
        found = []
        for row, value in enumerate(table[column], 1):
            value = value.split() if isinstance(value, str) else [] if value is None else value
            if not isinstance(value, list):
                raise ValueError(
                    f"{option}={column!r} of {where} row {row} holds a {type(value).__name__}; a list is needed, "
                    "or a text with blanks between words"
                )
            found.append(["" if item is None else item for item in value])
        return found

    def _tags(self, table: Dataset, where: str) -> list[list[str]]:
        column = self.args.label_column
        lists = self._lists(table, column, "label_column", where)
        kind = getattr(table.features[column], "feature", None)
        names = kind.names if isinstance(kind, ClassLabel) else self.args.label_names
        place = f"label_column={column!r} of {where} row"
        return [[label_name(value, names, f"{place} {row}") for value in tags] for row, tags in enumerate(lists, 1)]

    def training_texts(self) -> list[str]:
        return [self.args.word_separator.join(words) for words in self.rows["train"]["words"]]

    def configure(self, config, **options) -> None:
        if not self.processor.is_fast:
            raise ValueError(
                f"{type(self.processor).__name__} cannot say which word a token belongs to; token_classification "
                "needs a fast tokenizer"
            )
        self.processor.truncation_side = "right"  # the order in which windows come; none of them is left out
        super().configure(config, **options)
        self.has_scheme = is_scheme(self.labels)
        self.outside = self.labels.index("O") if "O" in self.labels else UNSEEN

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """Tokens of all windows of a sentence, one after the other; "windows": how many each has.

        "places": where each word is asked; with tags "truth", and "labels" of all tokens.
        """
        labels = self.targets(rows["label"], where) if "label" in rows.column_names else None
        room = self.longest - self.processor.num_special_tokens_to_add()
        self.stride = room // 4 if self.args.stride is None else self.args.stride
        if not self.stride < room:
            raise ValueError(
                f"stride={self.stride} must be less than the {room} tokens that a window of max_length={self.longest} "
                "has for a sentence"
            )
        others = [name for name in rows.column_names if name != "words"]
        encoded = rows.map(self._encode, batched=True, remove_columns=others)
        several = sum(len(windows) > 1 for windows in encoded["windows"])
        if several:
            self.notes.append(f"{several:,} of {len(rows):,} {where} texts are read in several windows")
        places = list(encoded["places"])
        if lost := sum(row.count(UNSEEN) for row in places):
            of = f"{lost:,} of {sum(map(len, places)):,} {where} words"
            self.notes.append(f"{of} have no token of their own: no tag is learned or found for them")
        if labels is None:
            return encoded
        lengths = map(len, encoded["input_ids"])
        of_tokens = [labels_of_tokens(*row) for row in zip(places, labels, lengths, strict=True)]
        return encoded.add_column("labels", of_tokens).add_column("truth", labels)

    def _encode(self, batch: dict[str, list]) -> dict[str, list]:
        separator = self.args.word_separator
        encoded = self.processor(
            [separator.join(words) for words in batch["words"]],
            truncation=True,
            max_length=self.longest,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        tokens = [name for name in encoded if name in self.processor.model_input_names]
        found = {name: [[] for _ in batch["words"]] for name in (*tokens, "windows", "spans")}
        for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
            marks = zip(encoded["offset_mapping"][window], encoded["special_tokens_mask"][window], strict=True)
            found["windows"][row].append(len(encoded["input_ids"][window]))
            found["spans"][row].append([SPECIAL if is_special else span for span, is_special in marks])
            for name in tokens:
                found[name][row] += encoded[name][window]
        pairs = zip(batch["words"], found.pop("spans"), strict=True)
        return {**found, "places": [places_in_windows(*pair, separator, self.stride) for pair in pairs]}

    def collator(self) -> "PadSentences":
        return PadSentences(self.processor)

    @staticmethod
    def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in batch.items() if name not in NOT_READ}

    @staticmethod
    def num_items(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Words with a tag."""
        return (batch["labels"] != NOT_ASKED).sum()

    # ------------------------------------------------------------------------------------------------ results

    def criterion(self, outputs, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0) -> torch.Tensor:
        is_asked = batch["labels"] != NOT_ASKED
        words = {"logits": outputs["logits"][is_asked]}
        return super().criterion(words, {"labels": batch["labels"][is_asked]}, label_smoothing=label_smoothing)

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        """A tag id for each word; of words that were not read the one of O, or UNSEEN where no tag is called so."""
        logits = model(**self.inputs_of(batch))["logits"].float()  # (W, L, K)
        is_token, sizes = batch["attention_mask"].bool(), batch["sizes"].tolist()
        logits, predictions = logits[is_token], []  # (tokens of all sentences, K)
        for tags, places in zip(logits.argmax(-1).split(sizes), batch["places"].tolist(), strict=True):
            tags, words = tags.tolist(), [place for place in places if place != NO_WORD]
            predictions.append({"tags": [self.outside if place == UNSEEN else tags[place] for place in words]})
        if "labels" in batch:
            labels = batch["labels"][is_token]
            losses = F.cross_entropy(logits, labels, reduction="none").split(sizes)
            for row, asked in enumerate((labels != NOT_ASKED).split(sizes)):
                truth = batch["truth"][row, : len(predictions[row]["tags"])].tolist()
                predictions[row] |= {"loss": losses[row].sum().item(), "items": int(asked.sum()), "truth": truth}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows=None) -> dict[str, float]:
        truth, found = (np.concatenate([p[key] for p in predictions]) for key in ("truth", "tags"))
        of_all = self._agreement(predictions)[""]
        return {
            "loss": mean_loss(predictions),
            **{name: of_all[name] for name in ("precision", "recall", "f1")},
            "accuracy": float((truth == found).mean()),
        }

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """The tags, and the entities with their first word and the one after their last, counted from 0."""
        found = [{"type": kind, "start": start, "end": end} for start, end, kind in self._entities(prediction["tags"])]
        return {"prediction": self._names(prediction["tags"]), "entities": found}

    def samples(self, predictions: Sequence[Prediction], rows, count: int = 4) -> list[dict[str, str]]:
        return [self._sample(predictions[row], rows[row]) for row in spread_and_worst(predictions, count)]

    def _sample(self, prediction: Prediction, row: dict) -> dict[str, str]:
        words = row["words"]
        said, truth = (
            ", ".join(f"{' '.join(words[start:end])} ({kind})" for start, end, kind in self._entities(tags))
            for tags in (prediction["tags"], prediction["truth"])
        )
        return {
            "prompt": self.args.word_separator.join(words),
            "text": f" -> {said or NOTHING}" + (f" [labelled {truth or NOTHING}]" if truth != said else ""),
        }

    def figures(self, predictions: Sequence[Prediction], rows) -> list[dict[str, str]]:
        """Words of each type, and the type that they got; where a tag is no B- or I- of a type, tags."""
        kinds = sorted({self._kind(tag) for tag in range(len(self.labels))}, key=lambda kind: (kind == "O", kind))
        places = {kind: place for place, kind in enumerate(kinds)}
        pairs = [pair for p in predictions for pair in zip(p["truth"], p["tags"], strict=True) if UNSEEN not in pair]
        truth, found = np.array([[places[self._kind(tag)] for tag in pair] for pair in pairs]).T
        return [{**confusion_matrix(truth, found, kinds), "title": "Words by type"}]

    def table(self, predictions: Sequence[Prediction], rows=None) -> str:
        """Entities, precision, recall and F1 of each type."""
        return scores_table(
            [{"label": kind or "all", **ratios} for kind, ratios in self._agreement(predictions).items()]
        )

    def _agreement(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
        truths, found = ([self._entities(p[key]) for p in predictions] for key in ("truth", "tags"))
        return agreement(truths, found)

    def _entities(self, tags: Sequence[int]) -> list[Entity]:
        read = entities if self.has_scheme else single_words
        return read(self._names(tags))

    def _names(self, tags: Sequence[int]) -> list[str]:
        return ["" if tag == UNSEEN else self.labels[tag] for tag in tags]

    def _kind(self, tag: int) -> str:
        name = self.labels[tag]
        return name[2:] if self.has_scheme and name != "O" else name


def places_of_words(words: Sequence[str], spans: Sequence[tuple[int, int]], separator: str) -> list[int]:
    """The position of the first token that begins in each word (blanks before it do not count), or UNSEEN.

    `spans` are the characters of each token in the words joined by `separator`; (-1, -1) for a special token.
    """
    owners, text = [], separator.join(words)
    for number, word in enumerate(words):
        owners += [number] * len(word) + ([None] * len(separator) if number < len(words) - 1 else [])
    places = [UNSEEN] * len(words)
    for position, (start, end) in enumerate(spans):
        first = next((at for at in range(max(start, 0), end) if not text[at].isspace()), None)
        owner = None if first is None else owners[first]
        if owner is not None and places[owner] == UNSEEN:
            places[owner] = position
    return places


def places_in_windows(
    words: Sequence[str], windows: Sequence[Sequence[tuple[int, int]]], separator: str, stride: int
) -> list[int]:
    """Where each word's first token is in the tokens of all `windows`, one after the other, or UNSEEN.

    A window is the spans of its tokens; neighbours share `stride` of those that are not special.  Of a word that is in
    several, that place is taken that has most tokens between it and where its window was cut off.
    """
    firsts, positions, spans, before = [], [], [], 0  # of each window: its first token in the sentence; its places
    for window in windows:
        own = [place for place, span in enumerate(window) if span != SPECIAL]
        shared = stride if firsts else 0
        firsts.append(len(spans) - shared)
        positions.append([before + place for place in own])
        spans += [window[place] for place in own[shared:]]
        before += len(window)
    last = len(windows) - 1

    def best(token: int) -> int:
        around = {}
        for number, (first, own) in enumerate(zip(firsts, positions, strict=True)):
            left, right = token - first, first + len(own) - 1 - token
            if left >= 0 and right >= 0:
                nearest = min(left if number else len(spans), right if number < last else len(spans))
                around[own[left]] = nearest
        return max(around, key=around.get)

    return [UNSEEN if token == UNSEEN else best(token) for token in places_of_words(words, spans, separator)]


def labels_of_tokens(places: Sequence[int], tags: Sequence[int], length: int) -> list[int]:
    """The tag at the first token of each word; NOT_ASKED elsewhere.

    >>> labels_of_tokens([0, 3, -1], [7, 8, 9], 5)
    [7, -100, -100, 8, -100]
    """
    labels = [NOT_ASKED] * length
    for place, tag in zip(places, tags, strict=True):
        if place != UNSEEN:
            labels[place] = tag
    return labels


@dataclass(frozen=True)
class PadSentences:
    """The windows of several sentences, padded as the tokenizer does.

    "labels" (W, L), NOT_ASKED where no word is asked; "sizes" (B,): tokens of each sentence, whose windows follow each
    other; "places" and "truth" (B, words) of each word, filled up with NO_WORD and NOT_ASKED.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        names = [name for name in rows[0] if name in self.tokenizer.model_input_names]
        parts = ([part for row in rows for part in cut(row[name], row["windows"])] for name in names)
        windows = [dict(zip(names, window, strict=True)) for window in zip(*parts, strict=True)]
        batch = pad_texts(self.tokenizer, windows, return_attention_mask=True)
        batch["sizes"] = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["places"] = padded([row["places"] for row in rows], NO_WORD)
        if "labels" in rows[0]:
            batch["labels"] = torch.full_like(batch["input_ids"], NOT_ASKED)
            batch["labels"][batch["attention_mask"].bool()] = torch.tensor([x for row in rows for x in row["labels"]])
            batch["truth"] = padded([row["truth"] for row in rows], NOT_ASKED)
        return batch


def cut(values: Sequence, lengths: Sequence[int]) -> list[Sequence]:
    """`values` in parts of these lengths."""
    ends = list(accumulate(lengths))
    return [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]
