"""Audio classification: one label for a whole recording.  Accuracy and macro-F1 over all predictions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForAudioClassification

from .classification import Classification, ClassificationArguments
from .recordings import RecordingArguments, RecordingRows, RecordingTask


@dataclass
class AudioClassificationArguments(RecordingArguments, ClassificationArguments):
    """Which recordings and labels."""

    _argument_group_name = "data of audio_classification"


class AudioClassification(RecordingTask, Classification):
    """Recordings and their labels."""

    name = "audio_classification"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "audio-classification",
        "auto_class": "AutoModelForAudioClassification",
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
        """Columns "audio" (undecoded) and "label"."""
        recordings = self.read_recordings(table, where)
        if not labelled:
            return Dataset.from_dict({"audio": recordings})
        labels = self.read_labels(table, where)
        return None if labels is None else Dataset.from_dict({"audio": recordings, "label": labels})

    def encode(self, rows: Dataset, where: str) -> RecordingRows:
        if "label" in rows.column_names:
            labels = self.label_ids(rows["label"], where)
            rows = rows.remove_columns("label").add_column("labels", labels)
        return RecordingRows(rows, where, sampling_rate=self.extractor.sampling_rate)

    def collator(self):
        def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
            batch = self.features([row["audio"] for row in rows])
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate
