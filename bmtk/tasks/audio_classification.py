"""Audio classification: one label for a whole recording.  Accuracy and macro-F1 over all predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForAudioClassification

from .recordings import RecordingArguments, RecordingRows, RecordingTask
from .row_classification import RowClassification, RowClassificationArguments
from .task import Prediction


@dataclass
class AudioClassificationArguments(RecordingArguments, RowClassificationArguments):
    """Which recordings and labels."""

    _argument_group_name = "data of audio_classification"

    def __post_init__(self):
        super().__post_init__()
        self.check_recordings()


class AudioClassification(RecordingTask, RowClassification):
    """Recordings and their labels."""

    name = "audio_classification"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "audio-classification",
        "auto_class": "AutoModelForAudioClassification",
        "processor_class": "AutoFeatureExtractor",
        "noun": "audio classifier",
        "limits": "It knows only the labels it was trained with, and gives one of them to every recording, silence "
        "included; its scores are not calibrated probabilities.",
    }
    arguments = AudioClassificationArguments
    auto_class = AutoModelForAudioClassification

    @property
    def processor(self):
        return self.extractor

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Columns "audio" (undecoded), "seconds" and "label"."""
        labels = self.read_labels(table, where) if labelled else None
        if labelled and labels is None:
            return None
        rows, kept = self.read_recordings(table, where, labelled=labelled)
        return rows.add_column("label", [labels[row] for row in kept]) if labelled else rows

    def encode(self, rows: Dataset, where: str) -> RecordingRows:
        if "label" in rows.column_names:
            labels = self.targets(rows["label"], where)
            rows = rows.remove_columns("label").add_column("labels", labels)
        return self.rows_of(rows, where)

    def collator(self):
        def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
            batch = self.padded(rows)
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate

    def figures(self, predictions: Sequence[Prediction], rows) -> list[dict[str, str]]:
        """The confusion matrix, and the recordings with the largest loss."""
        worst = np.argsort([-p["loss"] for p in predictions], kind="stable").tolist()
        return [*super().figures(predictions, rows), *self.shown_recordings(rows, worst, predictions)]
