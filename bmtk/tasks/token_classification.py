"""Token classification: a tag for every word of a sentence.  Precision, recall and F1 of exact entities.

A sentence is its words with `word_separator` between them, as `pipeline` reads it; the first token of a word carries
the word's tag, and no other token is learned from or asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, PreTrainedTokenizerBase

from bmtk.data.labels import label_name
from bmtk.data.tables import check_column
from bmtk.metrics.entities import Entity, agreement, entities, is_scheme, single_words

from .classification import Classification, ClassificationArguments
from .pictures import confusion_matrix
from .problems import scores_table
from .task import Prediction, mean_loss, setting, spread_and_worst
from .texts import TextArguments, TextTask, padded

UNSEEN = -1  # in place of a position: the word has no token; in place of a tag: none was found
NO_WORD = -2  # pads the places of words
NOT_ASKED = -100  # pads labels, and stands where no word begins
NOTHING = "nothing"


@dataclass
class TokenClassificationArguments(TextArguments, ClassificationArguments):
    """Which words and tags, and how many tokens of a sentence are read."""

    _argument_group_name = "data of token_classification"

    token_column: str = setting("tokens", "column of the words: lists, or texts with blanks between words")
    label_column: str = setting("tags", "column of the tags, one for each word: IOB1, IOB2, BIOES, or plain labels")
    word_separator: str = setting(" ", "what stands between two words of a sentence; for Chinese characters: ''")

    def __post_init__(self):
        super().__post_init__()
        self.check_lengths()


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
        super().configure(config, **options)
        self.has_scheme = is_scheme(self.labels)
        self.outside = self.labels.index("O") if "O" in self.labels else UNSEEN

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """Tokens; "places": where each word's first token is; with tags "truth", and "labels" of all tokens."""
        labels = self.targets(rows["label"], where) if "label" in rows.column_names else None
        encoded = rows.map(self._encode, batched=True, remove_columns=rows.column_names)
        self.say_what_was_cut(encoded["length"], where)
        places = list(encoded["places"])
        if lost := sum(row.count(UNSEEN) for row in places):
            of = f"{lost:,} of {sum(map(len, places)):,} {where} words"
            self.notes.append(f"{of} have no token of their own that is read: no tag is learned or found for them")
        encoded = encoded.remove_columns("length")
        if labels is None:
            return encoded
        lengths = map(len, encoded["input_ids"])
        of_tokens = [labels_of_tokens(*row) for row in zip(places, labels, lengths, strict=True)]
        return encoded.add_column("labels", of_tokens).add_column("truth", labels)

    def _encode(self, batch: dict[str, list]) -> dict[str, list]:
        separator = self.args.word_separator
        texts = [separator.join(words) for words in batch["words"]]
        whole = self.processor(texts, verbose=False, return_attention_mask=False)["input_ids"]
        encoded = self.processor(
            texts,
            truncation=True,
            max_length=self.longest,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        spans, specials = encoded.pop("offset_mapping"), encoded.pop("special_tokens_mask")
        places = [
            places_of_words(
                words, [(-1, -1) if is_special else span for span, is_special in zip(*of, strict=True)], separator
            )
            for words, *of in zip(batch["words"], spans, specials, strict=True)
        ]
        return {**encoded, "places": places, "length": list(map(len, whole))}

    def collator(self) -> "PadSentences":
        return PadSentences(self.processor)

    @staticmethod
    def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in batch.items() if name not in ("labels", "places", "truth")}

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
        logits = model(**self.inputs_of(batch))["logits"].float()  # (B, L, K)
        best, predictions = logits.argmax(-1).tolist(), []
        for tags, places in zip(best, batch["places"].tolist(), strict=True):
            words = [place for place in places if place != NO_WORD]
            predictions.append({"tags": [self.outside if place == UNSEEN else tags[place] for place in words]})
        if "labels" in batch:
            losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1).tolist()
            items = (batch["labels"] != NOT_ASKED).sum(1).tolist()
            for row, prediction in enumerate(predictions):
                truth = batch["truth"][row, : len(prediction["tags"])].tolist()
                prediction |= {"loss": losses[row], "items": items[row], "truth": truth}
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
        text = self.processor.decode(row["input_ids"], skip_special_tokens=True).strip()
        words = self._words_of(row)
        said, truth = (
            ", ".join(f"{' '.join(words[start:end])} ({kind})" for start, end, kind in self._entities(tags))
            for tags in (prediction["tags"], prediction["truth"])
        )
        return {
            "prompt": text,
            "text": f" -> {said or NOTHING}" + (f" [labelled {truth or NOTHING}]" if truth != said else ""),
        }

    def _words_of(self, row: dict) -> list[str]:
        """What the model read of each word."""
        starts = [place for place in row["places"] if place != UNSEEN]
        ends = dict(zip(starts, [*starts[1:], len(row["input_ids"])], strict=True))
        return [
            "?"
            if place == UNSEEN
            else self.processor.decode(row["input_ids"][place : ends[place]], skip_special_tokens=True).strip()
            for place in row["places"]
        ]

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
    """Pads tokens as the tokenizer does, and "labels", "places" and "truth" with NOT_ASKED, NO_WORD and NOT_ASKED."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens = [{name: row[name] for name in row if name in self.tokenizer.model_input_names} for row in rows]
        batch = dict(self.tokenizer.pad(tokens, return_tensors="pt"))
        batch["places"] = padded([row["places"] for row in rows], NO_WORD)
        if "labels" in rows[0]:
            batch["labels"] = padded([row["labels"] for row in rows], NOT_ASKED, width=batch["input_ids"].shape[1])
            batch["truth"] = padded([row["truth"] for row in rows], NOT_ASKED)
        return batch
