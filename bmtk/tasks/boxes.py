"""Boxes of an image: read, cut, moved with the image, drawn.  N boxes, K labels.

A box is [left, top, width, height] in pixels of its image, as in COCO.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageEnhance
import PIL.ImageFont
from datasets import ClassLabel, Dataset
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bmtk.data.labels import label_name
from bmtk.data.tables import check_column

from .figures import as_png

LEAST_VISIBLE = 0.3  # share of a box that must still be in a cropped image; the rest teaches no one where it ends
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


# -------------------------------------------------------------------------------------------------------- reading


def read_objects(
    table: Dataset, column: str, where: str, *, names: Sequence[str] | None
) -> list[tuple[np.ndarray, list[str]]]:
    """Boxes (N, 4) and the N names of their labels, for each row; none where a row has no objects.

    A row holds {"bbox", "category"} as lists, or a list of such pairs.  A name is what `category_name` says, or
    `names`, or the column's own type; else the category itself.
    Raises: ValueError, naming the row, for everything else.
    """
    check_column(table, column, option="objects_column", where=where)
    names = names or _names_of_type(table.features[column])
    places = (f"objects_column={column!r} of {where} row {row}" for row in range(1, len(table) + 1))
    return [_objects(value, place, names) for value, place in zip(table[column], places, strict=True)]


def _objects(value: object, place: str, names: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {key: [item.get(key) for item in value] for key in (value[0] if value else ())}
    if not value:
        return np.zeros((0, 4)), []
    kinds = "category_name" if isinstance(value, dict) and value.get("category_name") is not None else "category"
    if not isinstance(value, dict) or not {"bbox", kinds} <= value.keys():
        raise ValueError(f"{place} holds {str(value)[:80]}; give bbox and category, a list of each")
    boxes, labels = value["bbox"] or [], value[kinds] or []
    if len(boxes) != len(labels):
        raise ValueError(f"{place} has {len(boxes)} bbox and {len(labels)} {kinds}; give one for each object")
    for box in boxes:
        if not isinstance(box, list | tuple) or len(box) != 4 or None in box:
            raise ValueError(f"{place} has the bbox {box}; give [left, top, width, height] in pixels")
    named = [label_name(label, names if kinds == "category" else None, f"{kinds} of {place}") for label in labels]
    return np.array(boxes, dtype=float).reshape(-1, 4), named


def _names_of_type(kind) -> list[str] | None:
    """The names of a ClassLabel in {"category": [ClassLabel]} or [{"category": ClassLabel}]."""
    kind = getattr(kind, "feature", kind)
    kind = kind.get("category") if isinstance(kind, dict) else None
    kind = getattr(kind, "feature", kind)
    return kind.names if isinstance(kind, ClassLabel) else None


def cut(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """What of boxes (N, 4) lies in an image of this size; without area where nothing does."""
    size = np.array([width, height])
    low, high = boxes[:, :2].clip(0, size), (boxes[:, :2] + boxes[:, 2:]).clip(0, size)
    return np.concatenate((low, (high - low).clip(0)), axis=1)


# -------------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class BoxAugmentation:
    """A random view of an image and of its boxes; every draw comes from the generator that is handed in.

    `flip` is none, horizontal or both (then upside down, too); `scale` s zooms by 1 / (1 + s) to 1 + s, to a random
    part of the image or with a border of its mean colour; `colour` c changes brightness, contrast and saturation by
    factors of 1 - c to 1 + c.
    """

    flip: str
    scale: float
    colour: float

    def __call__(
        self, image: PIL.Image.Image, boxes: np.ndarray, draw: np.random.Generator
    ) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
        """The view, boxes (N, 4) in it, and which of them (N,) are still to be seen."""
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image, boxes, visible = self._zoom(image, boxes, draw)
        for axis, wanted in enumerate((self.flip != "none", self.flip == "both")):
            if wanted and draw.random() < 0.5:
                image = image.transpose((PIL.Image.FLIP_LEFT_RIGHT, PIL.Image.FLIP_TOP_BOTTOM)[axis])
                boxes = boxes.copy()
                boxes[:, axis] = image.size[axis] - boxes[:, axis] - boxes[:, axis + 2]
        return self._recolour(image, draw), boxes, visible

    def _zoom(self, image, boxes, draw):
        if not self.scale:
            return image, boxes, np.ones(len(boxes), dtype=bool)
        limit = np.log1p(self.scale)
        size = np.maximum(1, np.round(np.array(image.size) / np.exp(draw.uniform(-limit, limit)))).astype(int)
        spare = np.array(image.size) - size
        corner = np.round(draw.uniform(np.minimum(spare, 0), np.maximum(spare, 0))).astype(int)
        view = PIL.Image.new(image.mode, tuple(size.tolist()), image.resize((1, 1), PIL.Image.BOX).getpixel((0, 0)))
        view.paste(image, tuple((-corner).tolist()))
        moved = boxes - np.concatenate((corner, [0, 0]))
        seen = cut(moved, *size)
        return view, seen, seen[:, 2:].prod(1) >= LEAST_VISIBLE * moved[:, 2:].prod(1)

    def _recolour(self, image, draw):
        if not self.colour:
            return image
        kinds = (PIL.ImageEnhance.Brightness, PIL.ImageEnhance.Contrast, PIL.ImageEnhance.Color)
        for kind, factor in zip(kinds, draw.uniform(1 - self.colour, 1 + self.colour, size=3), strict=True):
            image = kind(image).enhance(factor)
        return image


# -------------------------------------------------------------------------------------------------------- drawing


def picture_of_boxes(
    images: Sequence[PIL.Image.Image],
    truth: Sequence[dict],
    predictions: Sequence[dict],
    labels: Sequence[str],
    captions: Sequence[str],
) -> dict[str, str]:
    """Images side by side: true boxes dashed and white, predicted ones in the colour of their label."""
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.4), layout="constrained")
    for number, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(image.convert("RGB"), extent=(0, image.width, image.height, 0))
        axes.set_title(captions[number], fontsize=9)
        axes.set_axis_off()
        for box in truth[number]["boxes"]:
            _draw(axes, box, colour="black", linewidth=2.2)
            _draw(axes, box, colour="white", linewidth=1.2, linestyle=(0, (4, 2)))
        found = predictions[number]
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
            colour = COLOURS[label % len(COLOURS)]
            _draw(axes, box, colour=colour, linewidth=1.4)
            patch = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
            axes.text(box[0], box[1], f"{score:.2f}", fontsize=5.5, color="white", bbox=patch, va="top", clip_on=True)
    keys = [Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", linestyle=(0, (4, 2)), label="box of the data")]
    keys += [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[index % len(COLOURS)], label=name)
        for index, name in enumerate(labels[: len(COLOURS)])
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False)
    return as_png(figure, "Predicted boxes, with their scores, over those of the data")


def with_boxes(image: PIL.Image.Image, found: dict, labels: Sequence[str]) -> PIL.Image.Image:
    """A copy of an image in its own size, with boxes in the colour of their label, its name and their scores."""
    image = image.convert("RGB")
    pen, unit = PIL.ImageDraw.Draw(image), max(image.size) / 500
    font = PIL.ImageFont.load_default(size=max(8, 11 * unit))
    for (left, top, width, height), label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
        colour, text = COLOURS[label % len(COLOURS)], f"{labels[label]} {score:.2f}"
        right, bottom = max(left, left + width - 1), max(top, top + height - 1)
        pen.rectangle((left, top, right, bottom), outline=colour, width=max(1, round(1.5 * unit)))
        pen.rectangle(pen.textbbox((left, top), text, font=font), fill=colour)
        pen.text((left, top), text, fill="white", font=font)
    return image


def _draw(axes, box: Sequence[float], *, colour: str, **line) -> None:
    axes.add_patch(Rectangle(box[:2], box[2], box[3], fill=False, edgecolor=colour, **line))
