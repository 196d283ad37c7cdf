"""Random changes of images, made for a whole batch at once.  B images, C channels, H x W pixels."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

DEGREES, SHIFT, SIZE, COLOUR = 15.0, 0.1, 0.2, 0.3  # the largest changes of strength 1; shifts in parts of the image


class Changes(NamedTuple):
    """What is done to an image: `matrix` (2, 3) leads from places in the new image to places in the old one (from -1
    to 1); then a channel c becomes gain[c] * c + shift[c]; stacked, with a first axis B."""

    matrix: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor


def drawn_changes(strength: float, draw: np.random.Generator) -> Changes:
    """Changes of one image, evenly distributed up to the largest."""
    angle = math.radians(DEGREES) * strength * draw.uniform(-1, 1)
    size = math.exp(SIZE * strength * draw.uniform(-1, 1))
    move = 2 * SHIFT * strength * draw.uniform(-1, 1, 2)
    cos, sin = math.cos(angle) * size, math.sin(angle) * size
    matrix = torch.tensor([[cos, -sin, move[0]], [sin, cos, move[1]]], dtype=torch.float32)
    gain, shift = COLOUR * strength * draw.uniform(-1, 1, (2, 3))
    return Changes(matrix, torch.tensor(1 + gain, dtype=torch.float32), torch.tensor(shift, dtype=torch.float32))


def changed(pixels: torch.Tensor, changes: Changes) -> torch.Tensor:
    """Images (B, C, H, W) after their changes; what comes in from outside is the nearest pixel of the border."""
    grid = F.affine_grid(changes.matrix, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    channels = pixels.shape[1]
    return moved * changes.gain[:, :channels, None, None] + changes.shift[:, :channels, None, None]
