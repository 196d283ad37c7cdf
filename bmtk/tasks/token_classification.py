"""Token classification: a tag for every word of a sentence.  Precision, recall and F1 of exact entities.

A sentence is its words with `word_separator` between them, as `pipeline` reads it; the first token of a word carries
the word's tag, and no other token counts, in training or evaluation.  A sentence that is too long for the model is
read in windows that overlap.  B sentences, W windows, L tokens, K tags.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, List, Value
from torch.nn import functional as F
from transformers import AutoModelForTokenClassification, PreTrainedConfig

from bmtk.data.columns import cells
from bmtk.data.labels import label_name, note_blanks
from bmtk.data.packing import IGNORE_INDEX
from bmtk.data.printed import looks_printed
from bmtk.data.tables import changed_rows, check_column, encoded_rows
from bmtk.errors import UserError
from bmtk.metrics.entities import Entity, agreement, entities, is_scheme, single_words
from bmtk.settings import fact, setting

from .classification import ClassificationArguments, LabelSet, labels_of, one_label
from .figures import confusion_matrix
from .label_types import scores_table
from .scorer import Scorer, mean_loss, spread_and_worst
from .sentence_windows import MISSING, PADDING, PadSentences, SentenceEncoder
from .task import Criterion, Prediction, Task
from .texts import TextArguments, TextData, TextObjective

NO_TAG = -1  # of a word without a token, where no tag is called "O"
NOT_READ = frozenset(("labels", "positions", "sizes", "truth"))  # what of a batch is not for the model
NOTHING = "nothing"
WORDS = List(Value("string"))


@dataclass
class TokenClassificationArguments(TextArguments, ClassificationArguments):
    """Which words and tags, and how many tokens of a sentence are read."""

    _argument_group_name = "data of token_classification"

    token_column: str = fact("tokens", "column of the words: lists, or texts with blanks between words")
    label_column: str = fact("tags", "column of the tags, one for each word: IOB1, IOB2, BIOES, or plain labels")
    word_separator: str = fact(" ", "what stands between two words of a sentence; for Chinese characters: ''")
    stride: int | None = setting(
        None, "tokens that two windows share, of a sentence longer than max_length; default: a quarter of a window"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()
        if self.stride is not None and self.stride < 0:
            raise UserError(f"stride={self.stride} must be at least 0 tokens")


class TokenClassificationData(TextData):
    """Columns "words" and "label" (tags), lists of strings."""

    inputs = ("words",)

    def __init__(self, task: Task, args: TokenClassificationArguments, **reading: Any):
        self.labels = one_label(args)
        super().__init__(task, args, **reading)
        self.labels.find_names(self.rows)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        """Sentences without words are left out, but not of those to be predicted."""
        words, tags = self.args.token_column, self.args.label_column
        check_column(table, words, option="token_column", where=where)
        if not labelled:
            return changed_rows(table, SentenceReader(words, where), {"words": WORDS})
        check_column(table, tags, option="label_column", where=where)
        feature = getattr(table.features[tags], "feature", None)
        names = feature.names if isinstance(feature, ClassLabel) else self.args.label_names
        lists = (value for value in cells(table, tags) if isinstance(value, list))
        note_blanks(lists, self.notes, option=f"label_column={tags!r}", where=where)
        reader = SentenceReader(words, where, tag_column=tags, names=names)
        rows = changed_rows(table, reader, {"words": WORDS, "label": WORDS})
        joined = (" ".join(row) for row in cells(rows, "words"))
        return self.keep_rows_with_text(rows, joined, option="token_column", where=where)

    def training_texts(self) -> Iterator[str]:
        return (self.args.word_separator.join(words) for words in cells(self.rows["train"], "words"))


@dataclass(frozen=True)
class SentenceReader:
    """Some rows of a table, and their numbers, as "words" and "label" (tags), lists of strings.

    Raises: UserError that names the row of a cell that is neither, or whose lists are of unequal length.
    """

    token_column: str
    where: str
    tag_column: str | None = None
    names: Sequence[str] | None = None  # of tags that are numbers

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        words = self._lists(batch, rows, "token_column", self.token_column)
        found = {"words": [list(map(str, row)) for row in words]}
        if self.tag_column is None:
            return found
        place = f"label_column={self.tag_column!r} of {self.where} row"
        lists = self._lists(batch, rows, "label_column", self.tag_column)
        tags = [
            [label_name(value, self.names, f"{place} {row + 1}") for value in of_row]
            for row, of_row in zip(rows, lists, strict=True)
        ]
        for row, one, other in zip(rows, words, tags, strict=True):
            if len(one) != len(other):
                raise UserError(
                    f"{self.where} row {row + 1} has {len(one)} words and {len(other)} tags; each word needs one"
                )
        return {**found, "label": tags}

    def _lists(self, batch: dict[str, list[Any]], rows: list[int], option: str, column: str) -> list[list[Any]]:
        found = []
        for row, value in zip(rows, batch[column], strict=True):
            place = f"{option}={column!r} of {self.where} row {row + 1}"
            if looks_printed(value):
                raise UserError(
                    f"{place} holds a list that was printed as text, "
                    f"{value[:60]}, and not every cell of the column can be read as one; mend this row, or give lists"
                )
            value = value.split() if isinstance(value, str) else [] if value is None else value
            if not isinstance(value, list):
                raise UserError(
                    f"{place} holds a {type(value).__name__}; a list is needed, or a text with blanks between words"
                )
            found.append(["" if item is None else item for item in value])
        return found


class TokenClassificationObjective(TextObjective):
    """Sentences become the `input_ids` of their windows; the first token of each word has the word's tag."""

    # The tag of a word is that of its first token; transformers' default shows the pieces of words.
    pipeline_options = ", aggregation_strategy='first'"
    data: TokenClassificationData

    def __init__(self, data: TokenClassificationData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        if not data.tokenizer.is_fast:
            raise UserError(
                f"{type(data.tokenizer).__name__} cannot say which word a token belongs to; token_classification "
                "needs a fast tokenizer"
            )
        # Windows then come in the order of the sentence, and none of them is left out.
        data.tokenizer.truncation_side = "right"
        super().__init__(data, config)
        known = list(labels) or labels_of(config, str(data.task.about["auto_class"]))
        self.labels: LabelSet = data.labels.bind(config, data.rows, known)
        if "train" in data.rows:
            self.notes.append(self.labels.kind.survey(data.rows["train"]["label"]))
        self.stride = self._stride()

    def _stride(self) -> int:
        """Tokens that two windows share.  Raises: UserError if nothing would be left to read in a second one."""
        room = self.longest - self.tokenizer.num_special_tokens_to_add()
        stride: int = room // 4 if self.args.stride is None else self.args.stride
        if not stride < room:
            raise UserError(
                f"stride={stride} must be less than the {room} tokens that a window of max_length={self.longest} "
                "has for a sentence"
            )
        return stride

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """As `SentenceEncoder`, beside "words"; with tags "truth" of words, and "labels" of all tokens."""
        if "label" in rows.column_names:
            self.labels.check(rows["label"], where)
        encoder = SentenceEncoder(self.tokenizer, self.args.word_separator, self.longest, self.stride, self.labels.ids)
        others = [name for name in rows.column_names if name != "words"]
        encoded = encoded_rows(rows, encoder, remove_columns=others)
        self._note_windows(encoded, where)
        return encoded

    def _note_windows(self, encoded: Dataset, where: str) -> None:
        several = sum(len(windows) > 1 for windows in cells(encoded, "windows"))
        if several:
            self.notes.append(f"{several:,} of {len(encoded):,} {where} texts are read in several windows")
        counts = Counter(position == MISSING for row in cells(encoded, "positions") for position in row)
        if counts[True]:
            of = f"{counts[True]:,} of {counts.total():,} {where} words"
            self.notes.append(f"{of} have no token of their own: no tag is learned or found for them")

    def collator(self) -> PadSentences:
        return PadSentences(self.tokenizer)

    def inputs_of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in NOT_READ}

    def num_items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Words with a tag."""
        count: torch.Tensor = (batch["labels"] != IGNORE_INDEX).sum()
        return count

    @property
    def criterion(self) -> Criterion:
        return self.loss_of_words

    def loss_of_words(
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """The losses of a batch, summed over the words with a tag."""
        has_tag = batch["labels"] != IGNORE_INDEX
        words = {"logits": outputs["logits"][has_tag]}
        return self.labels.criterion(words, {"labels": batch["labels"][has_tag]}, label_smoothing=label_smoothing)

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), "labels": self.labels.names}


class TokenClassificationScorer(Scorer):
    """Tags of words, and the entities that they make; where tags follow no scheme, each word is an entity."""

    metrics = ("loss", "precision", "recall", "f1", "accuracy")

    def __init__(self, objective: TokenClassificationObjective):
        super().__init__(objective)
        self.labels = objective.labels.names
        self.separator: str = objective.args.word_separator
        self.has_scheme = is_scheme(self.labels)
        self.outside = self.labels.index("O") if "O" in self.labels else NO_TAG

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """A tag id for each word; of words without a token the id of O, or NO_TAG where no tag is called so."""
        logits = model(**self.objective.inputs_of(batch))["logits"].float()  # (W, L, K)
        is_token, sizes = batch["attention_mask"].bool(), batch["sizes"].tolist()
        logits = logits[is_token]  # (tokens of all sentences, K)
        predictions: list[Prediction] = []
        for of_tokens, row in zip(torch.split(logits.argmax(-1), sizes), batch["positions"].tolist(), strict=True):
            tags, positions = of_tokens.tolist(), [position for position in row if position != PADDING]
            predictions.append({"tags": [self.outside if at == MISSING else tags[at] for at in positions]})
        if "labels" in batch:
            labels = batch["labels"][is_token]
            losses = torch.split(F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE_INDEX), sizes)
            for row, has_tag in enumerate(torch.split(labels != IGNORE_INDEX, sizes)):
                truth = batch["truth"][row, : len(predictions[row]["tags"])].tolist()
                predictions[row] |= {"loss": losses[row].sum().item(), "items": int(has_tag.sum()), "truth": truth}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: Any = None) -> dict[str, float]:
        truth, found = (np.concatenate([p[key] for p in predictions]) for key in ("truth", "tags"))
        overall = self._agreement(predictions)[""]
        return {
            "loss": mean_loss(predictions),
            **{name: overall[name] for name in ("precision", "recall", "f1")},
            "accuracy": float((truth == found).mean()),
        }

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """The tags, and the entities with their first word and the one after their last, counted from 0."""
        found = [{"type": kind, "start": start, "end": end} for start, end, kind in self._entities(prediction["tags"])]
        return {"prediction": self._names(prediction["tags"]), "entities": found}

    def samples(self, predictions: Sequence[Prediction], rows: Any, count: int = 4) -> list[dict[str, str]]:
        return [self._sample(predictions[row], rows[row]) for row in spread_and_worst(predictions, count)]

    def _sample(self, prediction: Prediction, row: Mapping[str, Any]) -> dict[str, str]:
        words = row["words"]
        predicted, truth = (
            ", ".join(f"{' '.join(words[start:end])} ({kind})" for start, end, kind in self._entities(tags))
            for tags in (prediction["tags"], prediction["truth"])
        )
        labelled = f" [labelled {truth or NOTHING}]" if truth != predicted else ""
        return {"prompt": self.separator.join(words), "text": f" -> {predicted or NOTHING}{labelled}"}

    def figures(self, predictions: Sequence[Prediction], rows: Any) -> list[dict[str, str]]:
        """Words of each type, and the type that was predicted; where a tag is no B- or I- of a type, tags."""
        types = sorted({self._type(tag) for tag in range(len(self.labels))}, key=lambda name: (name == "O", name))
        index = {name: number for number, name in enumerate(types)}
        pairs = [pair for p in predictions for pair in zip(p["truth"], p["tags"], strict=True) if NO_TAG not in pair]
        truth, found = np.array([[index[self._type(tag)] for tag in pair] for pair in pairs]).T
        return [{**confusion_matrix(truth, found, types), "title": "Words by type"}]

    def table(self, predictions: Sequence[Prediction], rows: Any = None) -> str:
        """Entities, precision, recall and F1 of each type."""
        return scores_table(
            [{"label": name or "all", **ratios} for name, ratios in self._agreement(predictions).items()]
        )

    def _agreement(self, predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
        truths, found = ([self._entities(p[key]) for p in predictions] for key in ("truth", "tags"))
        return agreement(truths, found)

    def _entities(self, tags: Sequence[int]) -> list[Entity]:
        read = entities if self.has_scheme else single_words
        return read(self._names(tags))

    def _names(self, tags: Sequence[int]) -> list[str]:
        return ["" if tag == NO_TAG else self.labels[tag] for tag in tags]

    def _type(self, tag: int) -> str:
        name = self.labels[tag]
        return name[2:] if self.has_scheme and name != "O" else name


TASK = Task(
    name="token_classification",
    auto_class=AutoModelForTokenClassification,
    about={
        "pipeline_tag": "token-classification",
        "auto_class": "AutoModelForTokenClassification",
        "noun": "tagger",
        "limits": "It knows only the tags it was trained with. Expect lower accuracy on text that differs from its "
        "training data, and on names that do not occur there.",
    },
    arguments=TokenClassificationArguments,
    data=TokenClassificationData,
    objective=TokenClassificationObjective,
    scorer=TokenClassificationScorer,
    main_metric="f1",
    unit="tokens",
    peft_task_type="TOKEN_CLS",
)
