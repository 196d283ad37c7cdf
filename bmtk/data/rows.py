"""What batches are made of."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

Indices = Sequence[int] | np.ndarray  # of rows, or the epoch of each


class Rows(Protocol):
    """A number of rows, and a dict of tensors for any list of them.

    `epochs` holds the pass over the data in which each row is asked for: what is drawn at random for a row (a mask, a
    crop) is a function of the row and its epoch, so that no restart changes it.
    """

    def __len__(self) -> int: ...
    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]: ...
