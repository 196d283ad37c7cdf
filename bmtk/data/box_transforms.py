"""Augmentation of images together with their boxes.  N boxes, each [left, top, width, height] in pixels of its image.

As in `image_transforms`, a row depends on nothing but what the caller seeds the generator with: (seed, epoch, row).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageStat
from PIL.Image import Resampling, Transpose

FORMATS = {
    "ltwh": "[left, top, width, height] in pixels",
    "ltrb": "[left, top, right, bottom] in pixels",
    "yolo": "[centre x, centre y, width, height] as shares of the image",
}
FLIPS = ("none", "horizontal", "both")
LEAST_BEYOND, LEAST_CORNERS = 0.1, 0.95  # shares of boxes that make them corners: beyond the image, fit as corners
LEAST_VISIBLE = 0.3  # share of a box that a zoomed image must still show: what is nearly gone has no edges to learn


def clip_boxes(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """The parts of boxes (N, 4) that lie in an image of this size; a box outside of it has no area left."""
    size = np.array([width, height])
    low, high = boxes[:, :2].clip(0, size), (boxes[:, :2] + boxes[:, 2:]).clip(0, size)
    return np.concatenate((low, (high - low).clip(0)), axis=1)


def as_ltwh(boxes: np.ndarray, size: tuple[int, int], box_format: str) -> np.ndarray:
    """Boxes (N, 4) of one of FORMATS, in an image of `size` (width, height), as "ltwh"."""
    first, second = boxes[:, :2], boxes[:, 2:]
    if box_format == "ltrb":
        return np.concatenate((first, second - first), axis=1)
    if box_format == "yolo":
        return np.concatenate((first - second / 2, second), axis=1) * np.array([*size, *size])
    return boxes


def likely_format(boxes: np.ndarray, sizes: np.ndarray) -> str:
    """Which of FORMATS boxes (N, 4) in images of `sizes` (N, 2: width, height) seem to be written in."""
    if not len(boxes) or not np.isfinite(boxes).all():
        return "ltwh"
    if ((boxes >= 0) & (boxes <= 1)).all() and (sizes > 8).all():
        return "yolo"
    first, second, limit = boxes[:, :2], boxes[:, 2:], sizes + 1  # a pixel of rounding
    beyond = (first + second > limit).any(1).mean()
    are_corners = ((second > first) & (second <= limit) & (first >= -1)).all(1).mean()
    return "ltrb" if beyond >= LEAST_BEYOND and are_corners >= LEAST_CORNERS else "ltwh"


@dataclass(frozen=True)
class BoxAugmentation:
    """A random view of an image and of its boxes; every random number comes from the generator of the call.

    `flip` is none, horizontal or both (also upside down); `scale` s zooms by 1 / (1 + s) to 1 + s, to a random part
    of the image or with a border of its mean colour; `colour` c changes brightness, contrast and saturation by
    factors of 1 - c to 1 + c.  A view has `size` (width, height), if it is given, made by `resample`: a reader of
    small images then mirrors and colours no pixels that it does not read.
    """

    flip: str
    scale: float
    colour: float
    size: tuple[int, int] | None = None
    resample: Resampling = Resampling.BILINEAR

    def __call__(
        self, image: PIL.Image.Image, boxes: np.ndarray, draw: np.random.Generator
    ) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
        """The view, boxes (N, 4) in it, and which of them (N,) are still visible."""
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image, boxes, visible = self._zoom(image, boxes, draw)
        for axis, wanted in enumerate((self.flip != "none", self.flip == "both")):
            if wanted and draw.random() < 0.5:
                image = image.transpose((Transpose.FLIP_LEFT_RIGHT, Transpose.FLIP_TOP_BOTTOM)[axis])
                boxes = boxes.copy()
                boxes[:, axis] = image.size[axis] - boxes[:, axis] - boxes[:, axis + 2]
        return self._recolour(image, draw), boxes, visible

    def _zoom(
        self, image: PIL.Image.Image, boxes: np.ndarray, draw: np.random.Generator
    ) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
        whole, corner = np.array(image.size), np.zeros(2, dtype=int)
        part = whole  # of the image, or more than it
        if self.scale:
            limit = np.log1p(self.scale)
            part = np.maximum(1, np.round(whole / np.exp(draw.uniform(-limit, limit)))).astype(int)
            spare = whole - part
            corner = np.round(draw.uniform(np.minimum(spare, 0), np.maximum(spare, 0))).astype(int)
        size = part if self.size is None else np.array(self.size)
        first, last = -corner * size / part, (whole - corner) * size / part  # corners of the image in the view
        if (part <= whole).all():  # no border, whose colour would take as long as the rest
            view = self._resized(image, size, (*corner.tolist(), *(corner + part).tolist()))
        else:
            first, last = np.round(first), np.maximum(np.round(last), np.round(first) + 1)
            inner = self._resized(image, (last - first).astype(int), (0, 0, *image.size))
            mean = inner.resize((1, 1), Resampling.BOX).getpixel((0, 0))
            view = PIL.Image.new(image.mode, tuple(size.tolist()), mean)
            view.paste(inner, tuple(first.astype(int).tolist()))
        moved = boxes * np.tile((last - first) / whole, 2) + np.concatenate((first, [0, 0]))
        seen = clip_boxes(moved, *size)
        return view, seen, seen[:, 2:].prod(1) >= LEAST_VISIBLE * moved[:, 2:].prod(1)

    def _resized(self, image: PIL.Image.Image, size: np.ndarray, part: Any) -> PIL.Image.Image:
        """A part of an image (left, top, right, bottom) as an image of this size (width, height)."""
        left, top, right, bottom = part
        if (right - left, bottom - top) == tuple(size.tolist()):
            return image.crop(part)  # which resizing would only take longer for
        return image.resize(tuple(size.tolist()), self.resample, box=part)

    def _recolour(self, image: PIL.Image.Image, draw: np.random.Generator) -> PIL.Image.Image:
        if not self.colour:
            return image
        bright, contrast, colourful = draw.uniform(1 - self.colour, 1 + self.colour, size=3)
        # ImageEnhance mixes two whole images for each; what it makes of a value is looked up here.
        image = by_value(image, PIL.Image.blend(flat(0), ramp(), bright))
        mean = int(PIL.ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
        image = by_value(image, PIL.Image.blend(flat(mean), ramp(), contrast))
        return PIL.ImageEnhance.Color(image).enhance(colourful)


def ramp() -> PIL.Image.Image:
    """Every value of eight bits, in order."""
    return PIL.Image.frombytes("L", (256, 1), bytes(range(256)))


def flat(value: int) -> PIL.Image.Image:
    return PIL.Image.new("L", (256, 1), value)


def by_value(image: PIL.Image.Image, values: PIL.Image.Image) -> PIL.Image.Image:
    """The image with the place of `values` that each value of its pixels names."""
    return image.point(values.tobytes() * len(image.getbands()))
