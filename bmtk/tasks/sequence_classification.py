"""Sequence classification: one label for a whole text.  Accuracy and macro-F1 over all predictions."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from bmtk.data.columns import cells, with_columns
from bmtk.data.spelling import most_ngrams, spelled_tokens, spelling_table
from bmtk.data.tables import TextColumn, encoded_rows, note_printed, text_rows
from bmtk.settings import fact

from .label_types import LabelType
from .row_classification import RowClassificationArguments, RowLabels, RowScorer
from .task import Criterion, Task
from .texts import TextArguments, TextData, TextObjective


@dataclass
class SequenceClassificationArguments(TextArguments, RowClassificationArguments):
    """Which texts and labels, and how many tokens of a text are read."""

    _argument_group_name = "data of sequence_classification"

    text_column: str = fact("text", "column of the text")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()


NGRAM_WEIGHTS = 2**20  # of a new model's n-grams at most, over all labels
NGRAM_BUCKETS = 131_072  # and rows of their table
NGRAM_SPELLING = 32  # n-grams of characters of a token, at most: all of a word of nine letters


class SequenceClassificationData(TextData):
    """Columns "text" and "label"."""

    inputs = ("text",)

    def __init__(self, task: Task, args: SequenceClassificationArguments, **reading: Any):
        self.labels = RowLabels(args)
        super().__init__(task, args, **reading)
        self.labels.find_names(self.rows)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Rows without text are left out, but not of those to be predicted."""
        rows = text_rows(table, {"text": TextColumn(self.args.text_column, "text_column")}, where=where)
        note_printed(cells(rows, "text"), self.notes, option="text_column", where=where)
        if not labelled:
            return rows
        labels = self.labels.read(table, where, self.notes)
        if labels is None:
            return None
        rows = with_columns(rows, {"label": labels})
        return self.keep_rows_with_text(rows, cells(rows, "text"), option="text_column", where=where)

    def training_texts(self) -> Iterator[str]:
        return cells(self.rows["train"], "text")

    @property
    def config_fields(self) -> dict[str, object]:
        """A new model of the project's families reads n-grams, too."""
        buckets = min(NGRAM_BUCKETS, max(1, NGRAM_WEIGHTS // max(1, len(self.labels.names))))
        spelling = min(NGRAM_SPELLING, most_ngrams(spelled_tokens(self.tokenizer)))
        return {**super().config_fields, "ngram_buckets": buckets, "ngram_spelling": spelling}

    @property
    def label_type(self) -> LabelType:
        return self.labels.kind


class SequenceClassificationObjective(TextObjective):
    """Texts become `input_ids`, and their labels `labels`."""

    data: SequenceClassificationData

    def __init__(self, data: SequenceClassificationData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config)
        self.labels = data.labels.bind_to(config, data, labels=labels)

    def encode(self, rows: Dataset, where: str) -> Dataset:
        tokenizer, longest = self.tokenizer, self.longest

        def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
            whole = tokenizer(batch["text"], verbose=False, return_attention_mask=False)["input_ids"]
            encoded = tokenizer(batch["text"], truncation=True, max_length=longest)
            return {**encoded, "length": list(map(len, whole))}

        labels = self.labels.targets(rows["label"][:], where) if "label" in rows.column_names else None
        encoded = encoded_rows(rows, encode, remove_columns=rows.column_names)
        self.note_cut_texts(encoded["length"], where)
        encoded = encoded.remove_columns("length")
        return encoded if labels is None else encoded.add_column("labels", labels)

    def prepare_to_save(self, model: PreTrainedModel) -> None:
        """Write how tokens are spelled into a model that reads it."""
        ngrams: Any = getattr(model, "ngrams", None)  # models of transformers have none
        if ngrams is None or ngrams.spelling is None:
            return
        table = spelling_table(spelled_tokens(self.tokenizer), ngrams.spelling.shape[1], ngrams.table.num_embeddings)
        ngrams.spelling[: len(table)] = torch.from_numpy(table)

    def num_items(self, batch: Mapping[str, Any]) -> int:
        """Rows, or of several labels each row's every label."""
        return self.labels.kind.num_items(batch["labels"])

    @property
    def criterion(self) -> Criterion:
        return self.labels.criterion

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), "labels": self.labels.names}


class SequenceClassificationScorer(RowScorer):
    """Samples show the text."""

    def shown(self, rows: Dataset, row: int) -> str:
        text = self.objective.processor.decode(rows[row]["input_ids"], skip_special_tokens=True)
        return str(text).strip()


TASK = Task(
    name="sequence_classification",
    auto_class=AutoModelForSequenceClassification,
    about={
        "pipeline_tag": "text-classification",
        "auto_class": "AutoModelForSequenceClassification",
        "noun": "text classifier",
        "limits": "It knows only the labels it was trained with, and its scores are not calibrated probabilities. "
        "Expect lower accuracy on text that differs from its training data.",
    },
    arguments=SequenceClassificationArguments,
    data=SequenceClassificationData,
    objective=SequenceClassificationObjective,
    scorer=SequenceClassificationScorer,
    unit="tokens",
    peft_task_type="SEQ_CLS",
)
