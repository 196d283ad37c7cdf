"""Sequence classification: one label for a whole text.  Accuracy and macro-F1 over all predictions."""

from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from bmtk.data.tables import check_column
from bmtk.settings import setting

from .row_classification import RowClassification, RowClassificationArguments
from .texts import TextArguments, TextTask


@dataclass
class SequenceClassificationArguments(TextArguments, RowClassificationArguments):
    """Which texts and labels, and how many tokens of a text are read."""

    _argument_group_name = "data of sequence_classification"

    text_column: str = setting("text", "column of the text")

    def __post_init__(self):
        super().__post_init__()
        self.check_lengths()


class SequenceClassification(TextTask, RowClassification):
    """Texts and their labels."""

    name = "sequence_classification"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "text-classification",
        "auto_class": "AutoModelForSequenceClassification",
        "noun": "text classifier",
        "limits": "It knows only the labels it was trained with, and its scores are not calibrated probabilities. "
        "Expect lower accuracy on text that differs from its training data.",
    }
    arguments = SequenceClassificationArguments
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    inputs = ("text",)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Columns "text" and "label"; rows without text are left out, but not of those to be predicted."""
        check_column(table, self.args.text_column, option="text_column", where=where)
        texts = ["" if text is None else str(text) for text in table[self.args.text_column]]
        if not labelled:
            return Dataset.from_dict({"text": texts})
        labels = self.read_labels(table, where)
        if labels is None:
            return None
        rows = Dataset.from_dict({"text": texts, "label": labels})
        return self.keep_rows_with_text(rows, texts, option="text_column", where=where)

    def training_texts(self) -> list[str]:
        return self.rows["train"]["text"]

    def encode(self, rows: Dataset, where: str) -> Dataset:
        def encode(batch: dict[str, list]) -> dict[str, list]:
            whole = self.processor(batch["text"], verbose=False, return_attention_mask=False)["input_ids"]
            encoded = self.processor(batch["text"], truncation=True, max_length=self.longest)
            return {**encoded, "length": list(map(len, whole))}

        labels = self.targets(rows["label"], where) if "label" in rows.column_names else None
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
        self.say_what_was_cut(encoded["length"], where)
        encoded = encoded.remove_columns("length")
        return encoded if labels is None else encoded.add_column("labels", labels)

    def shown(self, rows, row: int) -> str:
        return self.processor.decode(rows[row]["input_ids"], skip_special_tokens=True).strip()
