"""Augmentation of images, drawn anew in every epoch.  C channels, H x W pixels, uint8.

Everything is drawn from a generator that the caller seeds with (seed, epoch, row), so that neither the number of
workers or processes nor a restart changes what is learned.

Sources: crops and flips, Krizhevsky et al. 2012; RandAugment, Cubuk et al. 2019, arXiv:1909.13719; random erasing,
Zhong et al. 2017, arXiv:1708.04896; mixup, Zhang et al. 2018, arXiv:1710.09412; CutMix, Yun et al. 2019,
arXiv:1905.04899.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL import ImageEnhance, ImageOps
from torch.nn import functional as F

from bmtk.errors import UserError

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue (ITU-R BT.601)
ERASED_AREAS, ERASED_ASPECTS = (0.02, 1 / 3), (0.3, 3.3)  # Zhong et al., section 4.2; aspects: table 6
DEGREES, SHIFT, SIZE, COLOUR = (
    15.0,
    0.1,
    0.2,
    0.3,
)  # at strength 1; shifts in parts of the image
TRIES = 10  # rectangles drawn until one fits into the image
GREY = 128  # colour of what comes in from beyond an edge


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in the order of the fields; all of it is off by default."""

    random_crop: int = 0  # pixels that the image may move, along each side; its edges are mirrored
    horizontal_flip: bool = False  # of every second image
    rand_augment: int = 0  # transformations
    rand_augment_magnitude: float = 0.3  # strength of each: from 0, almost none, to 1, the strongest
    colour_jitter: float = 0.0  # brightness, contrast and saturation are multiplied by 1 - this to 1 + this
    random_erasing: float = 0.0  # probability that a rectangle becomes noise
    mixup: float = 0.0  # both parameters of the Beta distribution of an image's share in a mixture of two
    cutmix: float = 0.0  # likewise of an image's share, where a rectangle of it is replaced by that of another

    def __post_init__(self) -> None:
        for name in ("random_crop", "rand_augment", "mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 (0 turns it off)")
        for name in ("rand_augment_magnitude", "colour_jitter", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range; choose 0 <= {name} <= 1")

    @property
    def mixes(self) -> bool:
        """Whether two images are mixed into one with two labels."""
        return bool(self.mixup or self.cutmix)

    def __call__(self, image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """(C, H, W), uint8, in and out; `image` itself stays as it is."""
        if self.random_crop:
            image = moved(image, *draw.integers(-self.random_crop, self.random_crop, 2, endpoint=True))
        if self.horizontal_flip and draw.random() < 0.5:
            image = image[:, :, ::-1]
        if self.rand_augment:
            image = rand_augmented(image, draw, self.rand_augment, self.rand_augment_magnitude)
        if self.colour_jitter:
            image = jittered(image, *draw.uniform(1 - self.colour_jitter, 1 + self.colour_jitter, 3))
        if draw.random() < self.random_erasing:
            image = erased(image, draw)
        return image

    def mixed(self, image: np.ndarray, other: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, float]:
        """A mixture of two images and the share of the first in it; if both kinds are on, either is equally likely."""
        if not self.cutmix or (self.mixup and draw.random() < 0.5):
            share = draw.beta(self.mixup, self.mixup)
            return np.rint(share * image + (1 - share) * other).astype(np.uint8), share
        return pasted(image, other, draw, draw.beta(self.cutmix, self.cutmix))


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image, moved by whole pixels; what comes in is mirrored at the edge.

    Raises: UserError if nothing of the image would be left.
    """
    _, height, width = image.shape
    if abs(down) >= height or abs(right) >= width:
        raise UserError(
            f"random_crop of {max(abs(down), abs(right))} pixels is too large for an image of {height} x {width}"
        )
    return image[:, _mirrored(height, down)[:, None], _mirrored(width, right)]


@lru_cache  # the same few for all images of a set; nobody writes into them
def _mirrored(length: int, offset: int) -> np.ndarray:
    """offset, offset + 1, ... as places of an axis that is mirrored at its first and last place."""
    places = np.abs(np.arange(length) - offset)
    return length - 1 - np.abs(length - 1 - places)


def jittered(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Factors on the values, on their distance from the image's mean, and on their distance from grey."""
    pixels = image.astype(np.float32) * np.float32(brightness)
    mean = pixels.mean()
    pixels = mean + (pixels - mean) * np.float32(contrast)
    if len(pixels) == 3:
        grey = np.tensordot(LUMINANCE, pixels, axes=1)
        pixels = grey + (pixels - grey) * np.float32(saturation)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def erased(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The image with a rectangle of noise."""
    channels, height, width = image.shape
    for _ in range(TRIES):
        area = draw.uniform(*ERASED_AREAS) * height * width
        aspect = np.exp(draw.uniform(*np.log(ERASED_ASPECTS)))
        rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < rows <= height and 0 < columns <= width:
            top, left = draw.integers(height - rows, endpoint=True), draw.integers(width - columns, endpoint=True)
            image = image.copy()
            noise = draw.integers(256, size=(channels, rows, columns), dtype=np.uint8)
            image[:, top : top + rows, left : left + columns] = noise
            break
    return image


def pasted(image: np.ndarray, other: np.ndarray, draw: np.random.Generator, share: float) -> tuple[np.ndarray, float]:
    """The image with a rectangle of about 1 - `share` of its area from another, and the exact share that is left."""
    _, height, width = image.shape
    spans = []
    for length in (height, width):
        centre, side = draw.integers(length), round(length * (1 - share) ** 0.5)
        spans.append(slice(max(0, centre - side // 2), min(length, centre - side // 2 + side)))
    rows, columns = spans
    image = image.copy()
    image[:, rows, columns] = other[:, rows, columns]
    return image, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def rand_augmented(image: np.ndarray, draw: np.random.Generator, count: int, magnitude: float) -> np.ndarray:
    """The image after `count` transformations out of `TRANSFORMATIONS`, each in one direction or the other."""
    picture = PIL.Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1))
    for choice in draw.integers(len(TRANSFORMATIONS), size=count):
        strength = magnitude if draw.random() < 0.5 else -magnitude
        picture = TRANSFORMATIONS[choice](picture, strength)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)


def _affine(picture: PIL.Image.Image, *matrix: float) -> PIL.Image.Image:
    fill = (GREY,) * len(picture.getbands())
    nearest = PIL.Image.Resampling.NEAREST
    return picture.transform(picture.size, PIL.Image.Transform.AFFINE, matrix, nearest, fillcolor=fill)


def _enhance(kind: Callable[[PIL.Image.Image], Any]) -> Callable[[PIL.Image.Image, float], PIL.Image.Image]:
    return lambda picture, strength: kind(picture).enhance(1 + 0.9 * strength)


# Table 6 of Cubuk et al. 2018 (arXiv:1805.09501), as far as RandAugment uses it: (picture, -1 ... 1) -> picture.
TRANSFORMATIONS = (
    lambda picture, strength: picture,
    lambda picture, strength: ImageOps.autocontrast(picture),
    lambda picture, strength: ImageOps.equalize(picture),
    lambda picture, strength: picture.rotate(30 * strength, fillcolor=(GREY,) * len(picture.getbands())),
    lambda picture, strength: ImageOps.solarize(picture, round(256 * (1 - abs(strength)))),
    lambda picture, strength: ImageOps.posterize(picture, 8 - round(4 * abs(strength))),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    lambda picture, strength: _affine(picture, 1, 0.3 * strength, 0, 0, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0, 0.3 * strength, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0.45 * strength * picture.width, 0, 1, 0),
    lambda picture, strength: _affine(picture, 1, 0, 0, 0, 1, 0.45 * strength * picture.height),
)


# ------------------------------------------------------------------------------------------- of a whole batch at once


class BatchTransform(NamedTuple):
    """The change of an image, or of B of them stacked: `matrix` (2, 3) maps positions in the new image to positions in
    the old one (both from -1 to 1); then channel c becomes gain[c] * c + shift[c]."""

    matrix: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor


def draw_batch_transform(strength: float, draw: np.random.Generator) -> BatchTransform:
    """A change of one image, each part of it uniform up to its largest."""
    angle = math.radians(DEGREES) * strength * draw.uniform(-1, 1)
    size = math.exp(SIZE * strength * draw.uniform(-1, 1))
    move = 2 * SHIFT * strength * draw.uniform(-1, 1, 2)
    cos, sin = math.cos(angle) * size, math.sin(angle) * size
    matrix = torch.tensor([[cos, -sin, move[0]], [sin, cos, move[1]]], dtype=torch.float32)
    gain, shift = COLOUR * strength * draw.uniform(-1, 1, (2, 3))
    return BatchTransform(
        matrix, torch.tensor(1 + gain, dtype=torch.float32), torch.tensor(shift, dtype=torch.float32)
    )


def apply_batch_transform(pixels: torch.Tensor, transform: BatchTransform) -> torch.Tensor:
    """Images (B, C, H, W) after their changes; what comes in from outside is the nearest pixel of the border."""
    grid = F.affine_grid(transform.matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    channels = pixels.shape[1]
    return moved * transform.gain[:, :channels, None, None] + transform.shift[:, :channels, None, None]
