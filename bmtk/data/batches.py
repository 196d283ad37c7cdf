"""The batches of any optimizer step, for any number of processes, looked up rather than replayed."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch

from bmtk.errors import UserError

from .rows import Indices, Rows
from .shuffle import permuted_index


class CollatedRows:
    """The rows of a map-style data set and what makes a batch of them, as `Rows`.

    A data set that draws at random has `set_epoch`, which accelerate's loaders call, too; it is called in training
    only, so that evaluations draw nothing.
    """

    def __init__(
        self, examples: Any, collate: Callable[[list[Any]], dict[str, torch.Tensor]], *, is_training: bool = False
    ):
        self.examples, self.collate = examples, collate
        self.draws = is_training and hasattr(examples, "set_epoch")

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]:
        rows: list[Any] = []
        for epoch, places in groupby(zip(epochs, indices, strict=True), key=lambda place: int(place[0])):
            if self.draws:
                self.examples.set_epoch(epoch)
            numbers = [int(index) for _, index in places]
            rows += self._fetch(numbers)
        return self.collate(rows)

    def _fetch(self, indices: list[int]) -> list[Any]:
        """The rows themselves, in one call if the data set offers it."""
        if hasattr(self.examples, "__getitems__"):
            return self.examples.__getitems__(indices)
        return [self.examples[index] for index in indices]


class GlobalBatches:
    """`batches[step]`: the list of this process's micro-batches in optimizer step `step`, for any step >= 0.

    The order is endless: epoch after epoch, each with its own shuffle of all rows. Step s takes its rows
    [s * batch_size, (s + 1) * batch_size), across the end of an epoch if need be, and each rank takes an equal,
    contiguous share of them. So the rows of a step depend on (seed, step) alone, and resuming costs nothing.
    Raises: UserError if there are no rows, or the sizes do not fit together; ValueError for a rank out of range.
    """

    carries_state = False  # whether a row continues the same row of the previous step

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        micro_batch_size: int = 0,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        """`batch_size` rows per step over all processes, `micro_batch_size` per forward pass (0: the whole share)."""
        if len(rows) == 0:
            raise UserError("there are no rows to make batches of; the corpus is empty")
        _check_rank(rank, world_size)
        if batch_size < 1 or batch_size % world_size != 0:
            raise UserError(
                f"batch_size={batch_size} must be a multiple of the number of processes, {world_size}; "
                f"the nearest one above is {max(1, -(-batch_size // world_size)) * world_size}"
            )
        if micro_batch_size < 0:
            raise UserError(f"micro_batch_size={micro_batch_size} must be 0 (the whole share) or more rows")
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.share = batch_size // world_size
        self.micro_batch_size = min(micro_batch_size or self.share, self.share)
        self.rank = rank

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps per epoch: not a whole number when a batch spans two epochs."""
        return len(self.rows) / self.batch_size

    def positions(self, step: int) -> np.ndarray:
        """Where this rank's rows of optimizer step `step` stand in the endless order: (share,) int64."""
        if step < 0:
            raise IndexError(f"step={step} must be 0 or more")
        first = step * self.batch_size + self.rank * self.share
        return np.arange(first, first + self.share)

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of optimizer step `step` that are this rank's, in order, and the epoch of each: (share,) int64 both."""
        epoch, position = np.divmod(self.positions(step), len(self.rows))
        if not self.shuffle:
            return position, epoch
        return permuted_index(position, num_rows=len(self.rows), seed=self.seed, epoch=epoch), epoch

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        indices, epochs = self.places(step)
        cuts = [slice(i, i + self.micro_batch_size) for i in range(0, self.share, self.micro_batch_size)]
        return [self.rows.batch(indices[cut], epochs[cut]) for cut in cuts]


def sequential_batches(
    rows: Rows, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Every row exactly once over all ranks, in order, `batch_size` rows of this process at a time.

    Ranks hold contiguous shares that differ by one row at most, so the last batch may be smaller, one rank may have
    one batch more than another, and with fewer rows than ranks some have none.
    Raises: UserError if batch_size < 1; ValueError for a rank out of range.
    """
    _check_rank(rank, world_size)
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1 row")
    first, last = len(rows) * rank // world_size, len(rows) * (rank + 1) // world_size
    shares = (range(i, min(i + batch_size, last)) for i in range(first, last, batch_size))
    return (rows.batch(share, [0] * len(share)) for share in shares)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not one of world_size={world_size} processes, 0 to {world_size - 1}")
