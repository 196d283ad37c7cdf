"""Boxes drawn over their images: side by side for the report, or one image in its own size."""

from collections.abc import Sequence
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .figures import as_png, new_figure

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")
Boxes = dict[str, list[Any]]  # of one image: "boxes" and "labels"; predicted ones also with "scores"


def images_with_boxes(
    images: Sequence[PIL.Image.Image],
    truth: Sequence[Boxes],
    predictions: Sequence[Boxes],
    labels: Sequence[str],
    captions: Sequence[str],
) -> dict[str, str]:
    """Images side by side: true boxes dashed and white, predicted ones in the colour of their label."""
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(figsize=(4.2 * columns, 3.6 * rows + 0.4), layout="constrained")
    for number, image in enumerate(images):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(image.convert("RGB"), extent=(0, image.width, image.height, 0))
        axes.set_title(captions[number], fontsize=9)
        axes.set_axis_off()
        for box in truth[number]["boxes"]:
            _outline(axes, box, colour="black", linewidth=2.2)
            _outline(axes, box, colour="white", linewidth=1.2, linestyle=(0, (4, 2)))
        found = predictions[number]
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
            colour = COLOURS[label % len(COLOURS)]
            _outline(axes, box, colour=colour, linewidth=1.4)
            patch = {"facecolor": colour, "edgecolor": "none", "pad": 0.6, "alpha": 0.8}
            axes.text(box[0], box[1], f"{score:.2f}", fontsize=5.5, color="white", bbox=patch, va="top", clip_on=True)
    keys = [Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", linestyle=(0, (4, 2)), label="box of the data")]
    keys += [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=COLOURS[index % len(COLOURS)], label=name)
        for index, name in enumerate(labels[: len(COLOURS)])
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False)
    return as_png(figure, "Predicted boxes, with their scores, over those of the data")


def image_with_boxes(image: PIL.Image.Image, found: Boxes, labels: Sequence[str]) -> PIL.Image.Image:
    """A copy of an image in its own size, with boxes in the colour of their label, with its name and their scores."""
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


def _outline(axes: Axes, box: Sequence[float], *, colour: str, **line: Any) -> None:
    axes.add_patch(Rectangle((box[0], box[1]), box[2], box[3], fill=False, edgecolor=colour, **line))
