"""Images of more than 8 bits a pixel, as microscopes, scanners and cameras write them, in the 8 bits that models read.

Their values mean something by the range of the whole data set, [black, white]: Pillow's own conversion cuts off what
is above 255.  `models/image_processing_bm.py` does the same for images that users hand to a saved processor.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import PIL.Image

from bmtk.errors import UserError

FULL_RANGE = (0.0, 65535.0)  # of 16 bits
BITS = (8, 10, 12, 14, 16)  # that cameras count in: 12 of them are stored in 16
FLAT = 2.0  # deviation of the pixels of an image, of 255, below which it shows nearly one colour

Range = tuple[float, float]


def is_deep(mode: str) -> bool:
    """Whether Pillow's mode holds more than 8 bits a channel: 16-bit and 32-bit integers, and floats."""
    return mode.startswith("I") or mode == "F"


def eight_bits(image: PIL.Image.Image, value_range: Sequence[float] | None, where: str) -> PIL.Image.Image:
    """A deep image in 8 bits, the first of the range black and the second white; another image as it is.

    Without a range that of 16 bits is meant.  Raises: UserError if the values cannot be of that.
    """
    if not is_deep(image.mode):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    low, high = FULL_RANGE if value_range is None else value_range
    if value_range is None and (image.mode == "F" or values.min() < low or values.max() > high):
        raise UserError(
            f"{where} holds values from {values.min():g} to {values.max():g}, which are no 16-bit ones: set "
            "image_range, the values that are black and white (image_range 0 1)"
        )
    return PIL.Image.fromarray(np.rint((values.clip(low, high) - low) / (high - low) * 255).astype(np.uint8))


def range_of(images: Iterable[PIL.Image.Image]) -> tuple[Range, str] | None:
    """Black and white of the deep images among these, and the reason; None if there are none.

    Whole numbers are counted in as many bits as their largest needs; floats are from 0 or -1 to 1, to 255, or to the
    largest.  Raises: UserError for whole numbers and floats together.
    """
    kinds: set[str] = set()
    low, high = np.inf, -np.inf
    for image in images:
        if is_deep(image.mode):
            values = np.asarray(image)
            values = values[np.isfinite(values)]
            if values.size:
                kinds.add("floats" if image.mode == "F" else "whole numbers")
                low, high = min(low, float(values.min())), max(high, float(values.max()))
    if not kinds:
        return None
    if len(kinds) > 1:
        raise UserError(
            "some images hold whole numbers and others floats, so no range fits all of them; write all images alike, "
            "or set image_range"
        )
    found = _whole_range(low, high) if kinds == {"whole numbers"} else _float_range(low, high)
    return found, f"{kinds.pop()} from {low:g} to {high:g}"


def _whole_range(low: float, high: float) -> Range:
    white = next((2**bits - 1 for bits in BITS if high < 2**bits), None)
    return (low, max(high, low + 1)) if low < 0 or white is None else (0.0, float(white))


def _float_range(low: float, high: float) -> Range:
    if -1 <= low and high <= 1:
        return (0.0 if low >= 0 else -1.0), 1.0
    return (0.0, 255.0) if low >= 0 and 127 < high <= 255 else (low, high if high > low else low + 1)


def flat_share(images: Iterable[np.ndarray]) -> float:
    """The part of images (H, W, C), 8 bits, that show nearly one colour."""
    return float(np.mean([np.asarray(image, dtype=np.float64).std((0, 1)).max() < FLAT for image in images]))
