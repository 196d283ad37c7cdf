"""Image classification: one label for a whole image.  Accuracy, macro-F1 and top-5 accuracy over all predictions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, PreTrainedConfig

from bmtk.data.columns import with_columns
from bmtk.errors import UserError
from bmtk.settings import setting

from .figures import image_grid, png_of_pixels
from .images import AugmentedImageArguments, ImageData, ImageObjective, PixelRows
from .label_types import LabelType
from .row_classification import RowClassificationArguments, RowLabels, RowScorer
from .scorer import spread_and_worst
from .task import Criterion, Prediction, Task

WORST = 24  # images of the figure


@dataclass
class ImageClassificationArguments(AugmentedImageArguments, RowClassificationArguments):
    """Which images and labels, and what is done to images in training, with their labels."""

    _argument_group_name = "data of image_classification"

    random_erasing: float = setting(0.0, "probability that a rectangle of a training image becomes noise")
    mixup: float = setting(0.0, "mix two training images and their labels in shares from Beta(mixup, mixup)")
    cutmix: float = setting(0.0, "paste a rectangle of another training image, in shares from Beta(cutmix, cutmix)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "focal" and self.augmentation.mixes:
            raise UserError(f"loss={self.loss} is not defined for mixed labels; leave mixup and cutmix out")


class ImageClassificationData(ImageData):
    """Columns "image" (undecoded) and "label"."""

    def __init__(self, task: Task, args: ImageClassificationArguments, **reading: Any):
        self.labels = RowLabels(args)
        super().__init__(task, args, **reading)
        self.labels.find_names(self.rows)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        images = self.read_images(table, where)
        if not labelled:
            return images
        labels = self.labels.read(table, where, self.notes)
        return None if labels is None else with_columns(images, {"label": labels})

    @property
    def label_type(self) -> LabelType:
        return self.labels.kind

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "pixels"}


class ImageClassificationObjective(ImageObjective):
    """Images become `pixel_values`, and their labels `labels`."""

    data: ImageClassificationData

    def __init__(self, data: ImageClassificationData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config)
        self.labels = data.labels.bind_to(config, data, labels=labels)

    def encode_splits(self) -> None:
        super().encode_splits()
        if "train" in self.rows and not self.data.has_processor:
            self.normalise_by(self.rows["train"])

    def encode(self, rows: Dataset, where: str) -> PixelRows:
        if "label" in rows.column_names:
            labels = self.labels.targets(rows["label"][:], where)
            rows = with_columns(rows.remove_columns("label"), {"labels": labels})
        return self.pixel_rows(rows, where)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batch = {"pixel_values": self.scaled(np.stack([row["pixels"] for row in rows]))}
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            if "other" in rows[0]:
                others = torch.tensor([row["other"]["labels"] for row in rows])
                shares = torch.tensor([row["share"] for row in rows])
                batch["labels"] = mixed_labels(batch["labels"], others, shares, len(self.labels.names))
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


class ImageClassificationScorer(RowScorer):
    """Also the images that were most confidently wrong."""

    def shown(self, rows: PixelRows, row: int) -> str:
        return str(rows.rows.rows[row]["image"]["path"] or f"row {row + 1}")

    def samples(self, predictions: Sequence[Prediction], rows: PixelRows, count: int = 4) -> list[dict[str, str]]:
        """Each with its image, as the model sees it before pixels are normalised."""
        images = rows.pixels(spread_and_worst(predictions, count))
        found = zip(super().samples(predictions, rows, count), images, strict=True)
        return [{**sample, "png_base64": png_of_pixels(image)} for sample, image in found]

    def figures(self, predictions: Sequence[Prediction], rows: PixelRows) -> list[dict[str, str]]:
        """The confusion matrix, and the images whose label was given the least probability."""
        wrong = [row for row, prediction in enumerate(predictions) if not self.kind.is_right(prediction)]
        worst = sorted(wrong, key=lambda row: -predictions[row]["loss"])[:WORST]
        if not worst:
            return super().figures(predictions, rows)
        captions = [self.kind.mistake(predictions[row]) for row in worst]
        title = f"The {len(worst)} most wrong of {len(wrong):,} mistakes among {len(predictions):,} images"
        return [*super().figures(predictions, rows), image_grid(list(rows.pixels(worst)), captions, title)]


def mixed_labels(labels: torch.Tensor, others: torch.Tensor, shares: torch.Tensor, count: int) -> torch.Tensor:
    """`shares` (B,) of `labels`, the rest of `others`; of ids (B,) among `count` labels, probabilities (B, count)."""
    if not labels.is_floating_point():
        labels, others = F.one_hot(labels, count), F.one_hot(others, count)
    shares = shares.to(torch.float32).view(-1, *[1] * (labels.ndim - 1))
    return shares * labels + (1 - shares) * others


TASK = Task(
    name="image_classification",
    auto_class=AutoModelForImageClassification,
    about={
        "pipeline_tag": "image-classification",
        "auto_class": "AutoModelForImageClassification",
        "processor_class": "AutoImageProcessor",
        "noun": "image classifier",
        "limits": "It knows only the labels it was trained with, and gives one of them to every image, whatever it "
        "shows; its scores are not calibrated probabilities.",
    },
    arguments=ImageClassificationArguments,
    data=ImageClassificationData,
    objective=ImageClassificationObjective,
    scorer=ImageClassificationScorer,
    unit="images",
)
