"""Audio classification: one label for a whole recording.  Accuracy and macro-F1 over all predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForAudioClassification, PreTrainedConfig

from bmtk.data.columns import with_columns

from .label_types import LabelType
from .recordings import RecordingArguments, RecordingData, RecordingObjective, RecordingRows, worst_spectrograms
from .row_classification import RowClassificationArguments, RowLabels, RowScorer
from .task import Criterion, Prediction, Task


@dataclass
class AudioClassificationArguments(RecordingArguments, RowClassificationArguments):
    """Which recordings and labels."""

    _argument_group_name = "data of audio_classification"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_recordings()


class AudioClassificationData(RecordingData):
    """Columns "audio" (undecoded), "seconds" and "label"."""

    def __init__(self, task: Task, args: AudioClassificationArguments, **reading: Any):
        self.labels = RowLabels(args)
        super().__init__(task, args, **reading)
        self.labels.find_names(self.rows)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        labels = self.labels.read(table, where, self.notes) if labelled else None
        if labelled and labels is None:
            return None
        rows, kept = self.read_recordings(table, where, labelled=labelled)
        return rows if labels is None else with_columns(rows, {"label": [labels[row] for row in kept]})

    @property
    def label_type(self) -> LabelType:
        return self.labels.kind


class AudioClassificationObjective(RecordingObjective):
    """Recordings become features, and their labels `labels`."""

    data: AudioClassificationData

    def __init__(self, data: AudioClassificationData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config)
        self.labels = data.labels.bind_to(config, data, labels=labels)

    def encode(self, rows: Dataset, where: str) -> RecordingRows:
        if "label" in rows.column_names:
            labels = self.labels.targets(rows["label"][:], where)
            rows = with_columns(rows.remove_columns("label"), {"labels": labels})
        return self.recording_rows(rows, where)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = self.padded(rows)
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate

    def num_items(self, batch: Mapping[str, Any]) -> int:
        """Rows, or of several labels each row's every label."""
        return self.labels.kind.num_items(batch["labels"])

    @property
    def criterion(self) -> Criterion:
        return self.labels.criterion

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), "labels": self.labels.names}


class AudioClassificationScorer(RowScorer):
    """Also the spectrograms of the recordings with the largest loss."""

    def figures(self, predictions: Sequence[Prediction], rows: RecordingRows) -> list[dict[str, str]]:
        worst = np.argsort([-p["loss"] for p in predictions], kind="stable").tolist()
        verdicts = [self.verdict(prediction) for prediction in predictions]
        return [*super().figures(predictions, rows), *worst_spectrograms(rows, worst, verdicts)]


TASK = Task(
    name="audio_classification",
    auto_class=AutoModelForAudioClassification,
    about={
        "pipeline_tag": "audio-classification",
        "auto_class": "AutoModelForAudioClassification",
        "processor_class": "AutoFeatureExtractor",
        "noun": "audio classifier",
        "limits": "It knows only the labels it was trained with, and gives one of them to every recording, silence "
        "included; its scores are not calibrated probabilities.",
    },
    arguments=AudioClassificationArguments,
    data=AudioClassificationData,
    objective=AudioClassificationObjective,
    scorer=AudioClassificationScorer,
    unit="recordings",
)
