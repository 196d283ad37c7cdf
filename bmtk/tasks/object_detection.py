"""Object detection: boxes with a label in an image.  COCO's average precision over all predictions of a split.

A box is [left, top, width, height] in pixels of the original image, in the data and in predictions alike.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from transformers import AutoModelForObjectDetection

from bmtk.data.epoch_dataset import EpochDataset
from bmtk.data.labels import agreed_labels, in_order, some
from bmtk.data.media import image_size
from bmtk.metrics.boxes import average_precisions, summary
from bmtk.settings import setting

from .boxes import BoxAugmentation, cut, picture_of_boxes, read_objects, with_boxes
from .classification import labels_of
from .images import ImageArguments, ImageRows, ImageTask
from .task import DataArguments, Prediction, mean_loss, spread_and_worst

FLIPS = ("none", "horizontal", "both")
LEAST_SCORE = 0.05  # of a box that is measured; what lies below changes an average precision little and costs time
MOST_NAMES = 20  # labels whose average precision is a metric of its own
PICTURED = 3  # images from all over a split in the report's picture, and as many of the worst


@dataclass
class ObjectDetectionArguments(ImageArguments, DataArguments):
    """Which images, boxes and labels, and what is done to them in training."""

    _argument_group_name = "data of object_detection"

    objects_column: str = setting(
        "objects", "column of the objects: bbox ([left, top, width, height] in pixels) and category, a list of each"
    )
    label_names: list[str] | None = setting(None, "names of the integer categories 0, 1, ... in that order")
    score_threshold: float = setting(0.5, "least score of a box that is written or drawn; metrics go by all boxes")
    flip: str = setting("horizontal", "training images are mirrored at random: none, horizontal, or both ways")
    scale_jitter: float = setting(0.25, "training images are zoomed at random by 1 / (1 + this) to 1 + this; 0: not")
    colour_jitter: float = setting(
        0.2, "brightness, contrast and saturation of training images change by up to this share; 0: not"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.flip not in FLIPS:
            raise ValueError(f"flip={self.flip!r} is unknown; choose one of {', '.join(FLIPS)}")
        if self.scale_jitter < 0:
            raise ValueError(f"scale_jitter={self.scale_jitter} must be at least 0")
        if not 0 <= self.colour_jitter <= 1:
            raise ValueError(f"colour_jitter={self.colour_jitter} is not a share; choose between 0 and 1")
        if not LEAST_SCORE <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold={self.score_threshold} must be from {LEAST_SCORE} to 1")


class DetectionRows(EpochDataset, ImageRows):
    """Rows {"image", "annotations"}, annotations as in COCO.

    As soon as a training loop has named an epoch, images are augmented, as a function of seed, epoch and row alone.
    """

    first_epoch = -1

    def __init__(self, rows: Dataset, where: str, *, augmentation: BoxAugmentation, seed: int):
        super().__init__(rows, where)
        self.augmentation, self.seed = augmentation, seed

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [self.view(row, index) for row, index in zip(super().__getitems__(indices), indices, strict=True)]

    def view(self, row: dict, index: int) -> dict:
        if "boxes" not in row:
            return row
        image, boxes, labels = row["image"], np.array(row["boxes"]).reshape(-1, 4), np.array(row["labels"], dtype=int)
        if self.epoch >= 0:
            draw = np.random.default_rng([self.seed, self.epoch, index])
            image, boxes, visible = self.augmentation(image, boxes, draw)
            boxes, labels = boxes[visible], labels[visible]
        objects = [
            {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
        ]
        return {"image": image, "annotations": {"image_id": index, "annotations": objects}}


class ObjectDetection(ImageTask):
    """Images and their boxes.  The loss is the model's own, over positive locations where these can be counted."""

    name = "object_detection"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "object-detection",
        "auto_class": "AutoModelForObjectDetection",
        "processor_class": "AutoImageProcessor",
        "noun": "object detector",
        "loss_unit": "",
        "limits": "It finds only the kinds of objects it was trained with, at sizes and in scenes like those of its "
        "training images; its scores are not calibrated probabilities.",
    }
    arguments = ObjectDetectionArguments
    auto_class = AutoModelForObjectDetection
    free_keys = frozenset((*ImageTask.free_keys, "score_threshold"))
    main_metric = "map"

    @classmethod
    def incomparable(cls, args: ObjectDetectionArguments, metric: str) -> dict[str, str]:
        return {"objects_column": "decides which boxes are to be found"}

    # ------------------------------------------------------------------------------------------------ rows

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        """Columns "image" (undecoded), and "boxes" and "names", a list of each."""
        images = self.read_images(table, where)
        if not labelled:
            return Dataset.from_dict({"image": images})
        objects = read_objects(table, self.args.objects_column, where, names=self.args.label_names)
        objects = self._within_images(images, objects, where)
        if not any(names for _, names in objects):
            raise ValueError(f"objects_column={self.args.objects_column!r} of the {where} data holds no box at all")
        boxes, names = [boxes.tolist() for boxes, _ in objects], [names for _, names in objects]
        return Dataset.from_dict({"image": images, "boxes": boxes, "names": names})

    def _within_images(self, images: list[dict], objects: list[tuple], where: str) -> list[tuple]:
        """The objects, cut at the edges of their images; those of which nothing is left are left out and said."""
        kept, left_out, num_cut = [], [], 0
        for row, (image, (boxes, names)) in enumerate(zip(images, objects, strict=True), 1):
            inside = cut(boxes, *image_size(image, f"the image of {where} row {row}"))
            stays = (inside[:, 2:] > 0).all(1) & np.isfinite(boxes).all(1)
            left_out += [(row, box) for box in boxes[~stays].tolist()]
            num_cut += int((~np.isclose(inside, boxes).all(1))[stays].sum())
            kept.append((inside[stays], [name for name, stay in zip(names, stays, strict=True) if stay]))
        total = sum(len(boxes) for boxes, _ in objects)
        if left_out:
            row, box = left_out[0]
            self.notes.append(
                f"{len(left_out):,} of {total:,} {where} boxes have no area within their image: left out (the first "
                f"is {box} in row {row})"
            )
        if num_cut:
            self.notes.append(f"{num_cut:,} of {total:,} {where} boxes reach beyond their image: cut at its edge")
        return kept

    @property
    def metrics(self) -> list[str]:
        """Also of each label that the validation rows have, if there are few."""
        few = "validation" in self.rows and len(self.labels) <= MOST_NAMES
        there = {label for image in self._truth(self.rows["validation"]) for label in image["labels"]} if few else ()
        return ["loss", "map", "map_50", "map_75", *(f"ap_{self.labels[label]}" for label in sorted(there))]

    def prepare(self) -> None:
        """Find the labels: those of the training rows; of all rows, if none are for training."""
        sources = [self.rows["train"]] if "train" in self.rows else self.rows.values()
        self.names = self.args.label_names or in_order({name for rows in sources for name in _flat(rows["names"])})

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "pixels"}

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Write the labels into `config`.  A detector that knows the labels of the data keeps its own order of them.

        Raises: ValueError if a validation or test label is unknown.
        """
        found = {name for rows in self.rows.values() for name in _flat(rows["names"])}
        known = list(labels) or labels_of(config, self.about["auto_class"])
        self.labels, self.ids = agreed_labels(found, known, self.names, is_trained="train" in self.rows)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        self.config = config
        super().configure(config)

    def encode(self, rows: Dataset, where: str) -> DetectionRows:
        if "names" in rows.column_names:
            labels = [self._ids_of(names, f"{where} row {row}") for row, names in enumerate(rows["names"], 1)]
            rows = rows.remove_columns("names").add_column("labels", labels)
        args = self.args
        augmentation = BoxAugmentation(args.flip, args.scale_jitter, args.colour_jitter)
        return DetectionRows(rows, where, augmentation=augmentation, seed=self.seed)

    def _ids_of(self, names: Sequence[str], place: str) -> list[int]:
        if unknown := [name for name in names if name not in self.ids]:
            raise ValueError(
                f"{place} has an object labelled {unknown[0]!r}, which the training data do not have; known are "
                f"{some(self.ids)}"
            )
        return [self.ids[name] for name in names]

    def collator(self):
        def collate(rows: list[dict]) -> dict[str, torch.Tensor | list]:
            images = [row["image"] for row in rows]
            if "annotations" not in rows[0]:
                sizes = torch.tensor([(image.height, image.width) for image in images])
                return {**self.processor(images, return_tensors="pt"), "sizes": sizes}
            annotations = [row["annotations"] for row in rows]
            batch = dict(self.processor(images, annotations=annotations, return_tensors="pt"))
            return {**batch, "labels": [dict(label) for label in batch["labels"]]}

        return collate

    # ------------------------------------------------------------------------------------------------ training

    @cached_property
    def counter(self) -> torch.nn.Module:
        """The model without numbers: what it makes of sizes and boxes is all that is asked."""
        with torch.device("meta"):
            return self.auto_class.from_config(self.config, **self.loading)

    def num_items(self, batch: Mapping[str, object]) -> int | torch.Tensor:
        """Positive locations, by which the loss is divided; images, for a detector that does not count them."""
        if not hasattr(self.counter, "count_items"):
            return super().num_items(batch)
        return self.counter.count_items(pixel_values=batch["pixel_values"], labels=batch["labels"])

    # ------------------------------------------------------------------------------------------------ results

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        """Row by row: the loss of each is wanted, and a detector gives one for all."""
        counts = hasattr(model, "count_items")
        predictions = []
        for row in range(len(batch["pixel_values"])):
            inputs = {name: value[row : row + 1] for name, value in batch.items() if name != "sizes"}
            outputs = model(**inputs, **({"num_items_in_batch": 1} if counts else {}))
            size = inputs["labels"][0]["orig_size"] if "labels" in inputs else batch["sizes"][row]
            (found,) = self.processor.post_process_object_detection(
                outputs, threshold=LEAST_SCORE, target_sizes=[size.tolist()]
            )
            boxes = found["boxes"].float().cpu()
            boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
            prediction = {"boxes": boxes.tolist()} | {name: found[name].tolist() for name in ("labels", "scores")}
            if "labels" in inputs:
                prediction |= {"loss": float(outputs.loss), "items": int(self.num_items(inputs))}
            predictions.append(prediction)
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: DetectionRows) -> dict[str, float]:
        """`map`: the mean AP over overlaps of 0.50 to 0.95 and over labels; `map_50`, `map_75`: at one overlap."""
        precisions = average_precisions(self._truth(rows), predictions, len(self.labels))  # (T, K)
        metrics = {
            "loss": mean_loss(predictions),
            **summary(precisions),
        }
        if len(self.labels) <= MOST_NAMES:
            of_labels = zip(self.labels, precisions.mean(0), strict=True)
            metrics |= {f"ap_{label}": float(value) for label, value in of_labels if np.isfinite(value)}
        return metrics

    def describe(self, prediction: Prediction) -> dict[str, object]:
        found = self._above_threshold(prediction)
        return {
            "prediction": [
                {"label": self.labels[label], "score": round(score, 4), "box": [round(side, 1) for side in box]}
                for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
            ]
        }

    def drawn(self, prediction: Prediction, index: int, rows: DetectionRows) -> PIL.Image.Image:
        image = rows.__getitems__([index])[0]["image"]
        return with_boxes(image, self._above_threshold(prediction), self.labels)

    def samples(self, predictions: Sequence[Prediction], rows: DetectionRows, count: int = 4) -> list[dict[str, str]]:
        truth = self._truth(rows)
        return [
            {"prompt": f"image {row + 1}", "text": f" -> {self._verdict(predictions[row], truth[row])}"}
            for row in spread_and_worst(predictions, count)
        ]

    def figures(self, predictions: Sequence[Prediction], rows: DetectionRows) -> list[dict[str, str]]:
        chosen = spread_and_worst(predictions, PICTURED)
        captions = [f"image {row + 1}" for row in chosen]
        captions[PICTURED:] = [f"{caption}, of the largest loss" for caption in captions[PICTURED:]]
        truth, images = self._truth(rows), [row["image"] for row in rows.__getitems__(chosen)]
        found = [self._above_threshold(predictions[row]) for row in chosen]
        return [picture_of_boxes(images, [truth[row] for row in chosen], found, self.labels, captions)]

    def table(self, predictions: Sequence[Prediction], rows: DetectionRows) -> str:
        """Boxes and average precision of each label."""
        truth = self._truth(rows)
        precisions = average_precisions(truth, predictions, len(self.labels))
        counts = Counter(label for image in truth for label in image["labels"])
        width = max(len("label"), *map(len, self.labels))
        lines = [f"  {'label':<{width}}  {'boxes':>7}      AP   AP@50   AP@75"]
        for index, label in enumerate(self.labels):
            if counts[index]:
                values = (precisions[:, index].mean(), precisions[0, index], precisions[5, index])
                numbers = "".join(f"  {value:6.4f}" for value in values)
                lines.append(f"  {label:<{width}}  {counts[index]:>7,}{numbers}")
        return "\n".join(lines)

    def sizes(self) -> dict[str, dict[str, int]]:
        return {
            split: {"rows": len(rows), "boxes": sum(len(image["labels"]) for image in self._truth(rows))}
            for split, rows in self.rows.items()
        }

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "labels": self.labels}

    @staticmethod
    def _truth(rows: DetectionRows) -> list[dict[str, list]]:
        boxes, labels = list(rows.rows["boxes"]), list(rows.rows["labels"])
        return [{"boxes": of_image, "labels": ids} for of_image, ids in zip(boxes, labels, strict=True)]

    def _above_threshold(self, prediction: Prediction) -> dict[str, list]:
        chosen = [place for place, score in enumerate(prediction["scores"]) if score >= self.args.score_threshold]
        return {name: [prediction[name][place] for place in chosen] for name in ("boxes", "labels", "scores")}

    def _verdict(self, prediction: Prediction, truth: dict[str, list]) -> str:
        said, wanted = (
            Counter(self.labels[label] for label in image["labels"])
            for image in (self._above_threshold(prediction), truth)
        )
        return _counted(said) if said == wanted else f"{_counted(said)} (the data: {_counted(wanted)})"


def _counted(counts: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


def _flat(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for names in lists for name in names]
