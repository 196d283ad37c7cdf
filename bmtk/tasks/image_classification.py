"""Image classification: one label for a whole image.  Accuracy, macro-F1 and top-5 accuracy over all predictions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification

from .classification import Classification, ClassificationArguments
from .images import ImageArguments, ImageRows, ImageTask


@dataclass
class ImageClassificationArguments(ImageArguments, ClassificationArguments):
    """Which images and labels."""

    _argument_group_name = "data of image_classification"


class ImageClassification(ImageTask, Classification):
    """Images and their labels."""

    name = "image_classification"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "image-classification",
        "auto_class": "AutoModelForImageClassification",
        "noun": "image classifier",
        "limits": "It knows only the labels it was trained with, and gives one of them to every image, whatever it "
        "shows; its scores are not calibrated probabilities.",
    }
    arguments = ImageClassificationArguments
    auto_class = AutoModelForImageClassification

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """Columns "image" (undecoded) and "label"."""
        images = self.read_images(table, where)
        if not labelled:
            return Dataset.from_dict({"image": images})
        labels = self.read_labels(table, where)
        return None if labels is None else Dataset.from_dict({"image": images, "label": labels})

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "pixels"}

    def encode(self, rows: Dataset, where: str) -> ImageRows:
        if "label" in rows.column_names:
            labels = self.label_ids(rows["label"], where)
            rows = rows.remove_columns("label").add_column("labels", labels)
        return ImageRows(rows, where)

    def collator(self):
        def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
            batch = {"pixel_values": self.pixels([row["image"] for row in rows])}
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate
