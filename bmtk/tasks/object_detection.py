"""Object detection: boxes with a label in an image.  COCO's average precision over all predictions of a split.

A box is [left, top, width, height] in pixels of the original image, in the data and in predictions alike.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from transformers import AutoModelForObjectDetection, PreTrainedConfig

from bmtk.data.box_transforms import FLIPS, FORMATS, BoxAugmentation
from bmtk.data.columns import with_columns
from bmtk.data.epoch_dataset import EpochDataset
from bmtk.data.labels import agreed_labels, in_order, some
from bmtk.data.threads import side_by_side
from bmtk.errors import UserError
from bmtk.metrics.boxes import average_precisions, summary
from bmtk.settings import fact, setting

from .box_figures import Boxes, image_with_boxes, images_with_boxes
from .boxes import in_pixels, objects_within_images, read_objects, sizes_of
from .classification import labels_of
from .images import ImageArguments, ImageData, ImageObjective, ImageRows, flatness
from .scorer import Scorer, mean_loss, spread_and_worst
from .task import Prediction, Task
from .task_data import DataArguments

LEAST_SCORE = 0.05  # of a box that is measured; those below change an average precision little and cost time
MOST_NAMES = 20  # labels, at most, whose average precisions are metrics of their own
PICTURED = 3  # images from all over a split in the figure of the report, and as many of the worst


@dataclass
class ObjectDetectionArguments(ImageArguments, DataArguments):
    """Which images, boxes and labels, and what is done to them in training."""

    _argument_group_name = "data of object_detection"

    objects_column: str = fact(
        "objects", "column of the objects: bbox ([left, top, width, height] in pixels) and category, a list of each"
    )
    box_format: str | None = fact(
        None,
        "; ".join(f"{name}: {meaning}" for name, meaning in FORMATS.items())
        + "; default: ltwh, refused if the boxes look like another",
    )
    label_names: list[str] | None = fact(None, "names of the integer categories 0, 1, ... in that order")
    score_threshold: float = setting(0.5, "least score of a box that is written or drawn; metrics use all boxes")
    flip: str = fact("horizontal", "training images are mirrored at random: none, horizontal, or both ways")
    scale_jitter: float = setting(0.25, "training images are zoomed at random by 1 / (1 + this) to 1 + this; 0: off")
    colour_jitter: float = setting(
        0.2, "brightness, contrast and saturation of training images change by up to this share; 0: off"
    )

    free_keys: ClassVar[frozenset[str]] = ImageArguments.free_keys | {"score_threshold"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.box_format not in (None, *FORMATS):
            raise UserError(f"box_format={self.box_format!r} is unknown; choose one of {', '.join(FORMATS)}")
        if self.flip not in FLIPS:
            raise UserError(f"flip={self.flip!r} is unknown; choose one of {', '.join(FLIPS)}")
        if self.scale_jitter < 0:
            raise UserError(f"scale_jitter={self.scale_jitter} must be at least 0")
        if not 0 <= self.colour_jitter <= 1:
            raise UserError(f"colour_jitter={self.colour_jitter} is not a share; choose between 0 and 1")
        if not LEAST_SCORE <= self.score_threshold <= 1:
            raise UserError(f"score_threshold={self.score_threshold} must be from {LEAST_SCORE} to 1")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        return {**super().settings_that_change(metric), "objects_column": "decides which boxes are to be found"}


class DetectionRows(EpochDataset, ImageRows):
    """Rows {"image", "annotations"}, annotations as in COCO.

    From the first `set_epoch` on, which training alone calls, an image is augmented as a function of seed, epoch and
    row.  Where the augmentation knows the size that the model reads, images have it; those that are not augmented are
    resized once, and their annotations say the "boxes_size" (height, width) that boxes are in pixels of.
    """

    first_epoch = -1

    def __init__(
        self,
        rows: Dataset,
        where: str,
        *,
        image_range: Sequence[float] | None,
        augmentation: BoxAugmentation,
        seed: int,
        limit: int = 0,
    ):
        super().__init__(rows, where, image_range, limit=limit)
        self.augmentation, self.seed = augmentation, seed
        self.fitted: dict[int, PIL.Image.Image] = {}  # images of the size that the model reads

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return side_by_side(self.view, super().__getitems__(indices), indices)

    def view(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        if "boxes" not in row:
            return row
        image, boxes, labels = row["image"], np.array(row["boxes"]).reshape(-1, 4), np.array(row["labels"], dtype=int)
        size = {} if self.epoch >= 0 else {"boxes_size": (image.height, image.width)}
        if self.epoch < 0:
            image = self.of_size(image, index)
        else:
            draw = np.random.default_rng([self.seed, self.epoch, index])
            image, boxes, visible = self.augmentation(image, boxes, draw)
            boxes, labels = boxes[visible], labels[visible]
        objects = [
            {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
            for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
        ]
        return {"image": image, "annotations": {"image_id": index, "annotations": objects, **size}}

    def of_size(self, image: PIL.Image.Image, index: int) -> PIL.Image.Image:
        """The image of a row as the model reads it, if that is known; kept as decoded ones are."""
        size, is_plain = self.augmentation.size, image.mode in ("RGB", "L") and not image.has_transparency_data
        if index in self.fitted or size is None or not is_plain:
            return self.fitted.get(index, image)
        found = image.resize(size, self.augmentation.resample)
        num_bytes = found.width * found.height * len(found.getbands())
        if num_bytes <= self.bytes_left:
            self.fitted[index], self.bytes_left = found, self.bytes_left - num_bytes
        return found


class ObjectDetectionData(ImageData):
    """Columns "image" (undecoded), and "boxes" and "names", a list of each."""

    def __init__(self, task: Task, args: ObjectDetectionArguments, **reading: Any):
        super().__init__(task, args, **reading)
        # The labels of the training rows; of all rows, if none are for training.
        sources = [self.rows["train"]] if "train" in self.rows else self.rows.values()
        found = {name for rows in sources for name in _flat(rows["names"])}
        self.label_names: list[str] = args.label_names or in_order(found)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        images = self.read_images(table, where)
        if not labelled:
            return images
        objects = read_objects(table, self.args.objects_column, where, names=self.args.label_names)
        sizes = sizes_of(images["image"], where)
        objects = in_pixels(objects, sizes, self.args.box_format, where)
        objects = objects_within_images(sizes, objects, where, self.notes)
        if not any(names for _, names in objects):
            raise UserError(f"objects_column={self.args.objects_column!r} of the {where} data holds no box at all")
        boxes, names = [boxes.tolist() for boxes, _ in objects], [names for _, names in objects]
        return with_columns(images, {"boxes": boxes, "names": names})

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "pixels"}


class ObjectDetectionObjective(ImageObjective):
    """Images and their boxes.  The loss is the model's own, over positive locations if the model can count them."""

    data: ObjectDetectionData

    def __init__(self, data: ObjectDetectionData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        """A detector that knows the labels of the data keeps its own order of them.

        Raises: ValueError if a validation or test label is unknown.
        """
        super().__init__(data, config)
        found = {name for rows in data.rows.values() for name in _flat(rows["names"])}
        known = list(labels) or labels_of(config, str(self.about["auto_class"]))
        self.labels, self.ids = agreed_labels(found, known, data.label_names, is_trained="train" in data.rows)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}

    def encode(self, rows: Dataset, where: str) -> DetectionRows:
        if "names" in rows.column_names:
            labels = [self._ids_of(names, f"{where} row {row}") for row, names in enumerate(rows["names"], 1)]
            rows = with_columns(rows.remove_columns("names"), {"labels": labels})
        args = self.args
        size = fixed_size(self.processor)
        augmentation = BoxAugmentation(args.flip, args.scale_jitter, args.colour_jitter, size, self.processor.resample)
        options: Any = {"augmentation": augmentation, "seed": self.data.seed, "image_range": self.image_range}
        # Rows to be predicted are read once.
        limit = 0 if where == "input" else args.cache_megabytes * 10**6
        found = DetectionRows(rows, where, limit=limit, **options)
        if where == "train":
            self.notes += flatness(found)
        return found

    def _ids_of(self, names: Sequence[str], place: str) -> list[int]:
        if unknown := [name for name in names if name not in self.ids]:
            raise UserError(
                f"{place} has an object labelled {unknown[0]!r}, which the training data do not have; known are "
                f"{some(self.ids)}"
            )
        return [self.ids[name] for name in names]

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            images = [row["image"] for row in rows]
            if "annotations" not in rows[0]:
                sizes = torch.tensor([(image.height, image.width) for image in images])
                return {**self.processor(images, return_tensors="pt"), "sizes": sizes}
            made = self.processor(images, [row["annotations"] for row in rows], return_tensors="pt")
            return {**made, "labels": [dict(label) for label in made["labels"]]}

        return collate

    @cached_property
    def counter(self) -> Any:
        """The model without weights: sizes and boxes alone decide how many locations are positive."""
        with torch.device("meta"):
            return self.auto_class.from_config(self.config, **self.data.loading)

    def num_items(self, batch: Mapping[str, Any]) -> int | torch.Tensor:
        """Positive locations, by which the loss is divided; images, for a detector that does not count them.

        Which box a location predicts is kept in `labels`, for the loss not to find it again.
        """
        if not hasattr(self.counter, "assign_locations"):
            return super().num_items(batch)
        found: torch.Tensor = self.counter.assign_locations(batch["pixel_values"], batch["labels"])
        for label, assigned in zip(batch["labels"], found, strict=True):
            label["assigned"] = assigned
        return (found >= 0).sum()

    def sizes(self) -> dict[str, dict[str, float]]:
        return {
            split: {"rows": len(rows), "boxes": sum(len(image["labels"]) for image in true_boxes(rows))}
            for split, rows in self.rows.items()
        }

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), "labels": self.labels}


class ObjectDetectionScorer(Scorer):
    """A prediction holds the boxes of an image, and the label and score of each."""

    draws_images = True
    objective: ObjectDetectionObjective

    def __init__(self, objective: ObjectDetectionObjective):
        super().__init__(objective)
        self.labels = objective.labels

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # which they are depends on the labels
        """Also of each label that the validation rows have, if there are few."""
        rows = self.objective.rows
        few = "validation" in rows and len(self.labels) <= MOST_NAMES
        present = {label for image in true_boxes(rows["validation"]) for label in image["labels"]} if few else set()
        return ("loss", "map", "map_50", "map_75", *(f"ap_{self.labels[label]}" for label in sorted(present)))

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """The loss of each row is wanted: all at once of a model that gives them, of other detectors row by row."""
        if hasattr(model, "count_items") and "labels" in batch:
            outputs = model(**batch, num_items_in_batch=1, output_row_losses=True)
            items = outputs.row_items.tolist()
            return self._predictions(outputs, batch, list(zip(outputs.row_losses.tolist(), items, strict=True)))
        predictions = []
        for row in range(len(batch["pixel_values"])):
            of_row = {name: value[row : row + 1] for name, value in batch.items()}
            outputs = model(**{name: value for name, value in of_row.items() if name != "sizes"})
            losses = [(float(outputs.loss), int(self.objective.num_items(of_row)))] if "labels" in batch else []
            predictions += self._predictions(outputs, of_row, losses)
        return predictions

    def _predictions(
        self, outputs: Any, batch: Mapping[str, Any], losses: Sequence[tuple[float, int]]
    ) -> list[Prediction]:
        """Boxes of the images of a batch in pixels of the originals, with loss and items of those that have labels."""
        labels: list[Any] = batch.get("labels", [])
        sizes = [label["orig_size"] for label in labels] or list(batch["sizes"])
        found = self.objective.processor.post_process_object_detection(
            outputs, threshold=LEAST_SCORE, target_sizes=[size.tolist() for size in sizes]
        )
        predictions: list[Prediction] = []
        for of_image in found:
            boxes = of_image["boxes"].float().cpu()
            boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
            names = ("labels", "scores")
            predictions.append({"boxes": boxes.tolist()} | {name: of_image[name].tolist() for name in names})
        for prediction, (loss, items) in zip(predictions, losses, strict=bool(losses)):
            prediction |= {"loss": loss, "items": items}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: DetectionRows) -> dict[str, float]:
        """`map`: the mean AP over overlaps of 0.50 to 0.95 and over labels; `map_50`, `map_75`: at one overlap."""
        precisions = average_precisions(true_boxes(rows), predictions, len(self.labels))  # (T, K)
        metrics = {"loss": mean_loss(predictions), **summary(precisions)}
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

    def annotated_image(self, prediction: Prediction, index: int, rows: DetectionRows) -> PIL.Image.Image:
        image = rows.images([index])[0]["image"]
        return image_with_boxes(image, self._above_threshold(prediction), self.labels)

    def samples(self, predictions: Sequence[Prediction], rows: DetectionRows, count: int = 4) -> list[dict[str, str]]:
        truth = true_boxes(rows)
        return [
            {"prompt": f"image {row + 1}", "text": f" -> {self._verdict(predictions[row], truth[row])}"}
            for row in spread_and_worst(predictions, count)
        ]

    def figures(self, predictions: Sequence[Prediction], rows: DetectionRows) -> list[dict[str, str]]:
        chosen = spread_and_worst(predictions, PICTURED)
        captions = [f"image {row + 1}" for row in chosen]
        captions[PICTURED:] = [f"{caption}, of the largest loss" for caption in captions[PICTURED:]]
        truth, images = true_boxes(rows), [row["image"] for row in rows.images(chosen)]
        found = [self._above_threshold(predictions[row]) for row in chosen]
        return [images_with_boxes(images, [truth[row] for row in chosen], found, self.labels, captions)]

    def table(self, predictions: Sequence[Prediction], rows: DetectionRows) -> str:
        """Boxes and average precision of each label."""
        truth = true_boxes(rows)
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

    def _above_threshold(self, prediction: Prediction) -> Boxes:
        threshold = self.objective.args.score_threshold
        chosen = [index for index, score in enumerate(prediction["scores"]) if score >= threshold]
        return {name: [prediction[name][index] for index in chosen] for name in ("boxes", "labels", "scores")}

    def _verdict(self, prediction: Prediction, truth: Boxes) -> str:
        predicted, true = (
            Counter(self.labels[label] for label in image["labels"])
            for image in (self._above_threshold(prediction), truth)
        )
        return _counted(predicted) if predicted == true else f"{_counted(predicted)} (the data: {_counted(true)})"


def fixed_size(processor: Any) -> tuple[int, int] | None:
    """Width and height that an image processor of the project resizes every image to, at first; None for others."""
    is_plain = hasattr(processor, "for_config") and processor.do_resize and not processor.do_center_crop
    is_plain = is_plain and not processor.do_convert_grayscale  # before it resizes
    return (processor.size["width"], processor.size["height"]) if is_plain else None


def true_boxes(rows: DetectionRows) -> list[Boxes]:
    """The boxes and labels of each image as the data have them, without augmentation."""
    boxes, labels = rows.others["boxes"], rows.others["labels"]
    return [{"boxes": of_image, "labels": ids} for of_image, ids in zip(boxes, labels, strict=True)]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


def _flat(lists: Sequence[Sequence[str]]) -> list[str]:
    return [name for names in lists for name in names]


TASK = Task(
    name="object_detection",
    auto_class=AutoModelForObjectDetection,
    about={
        "pipeline_tag": "object-detection",
        "auto_class": "AutoModelForObjectDetection",
        "processor_class": "AutoImageProcessor",
        "noun": "object detector",
        "loss_unit": "",
        "limits": "It finds only the kinds of objects it was trained with, at sizes and in scenes like those of its "
        "training images; its scores are not calibrated probabilities.",
    },
    arguments=ObjectDetectionArguments,
    data=ObjectDetectionData,
    objective=ObjectDetectionObjective,
    scorer=ObjectDetectionScorer,
    main_metric="map",
    unit="images",
)
