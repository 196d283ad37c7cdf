"""The order of the rows in an epoch, and the batches of several processes that train together."""

from collections.abc import Iterable, Iterator, Sized
from itertools import pairwise
from typing import Any, cast

import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler


def lengths_of(rows: Any, name: str) -> list[int] | None:
    """How long the lists of the column `name` are, without making them; None if the rows are of no table that has it.

    `rows` are a data set, or hold one as their `rows`.
    """
    table = getattr(rows, "rows", rows)
    if not isinstance(table, Dataset) or name not in table.column_names:
        return None
    column: Any = table.select_columns(name).with_format("arrow")[:][name]
    is_list = pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type)
    return pyarrow.compute.list_value_length(column).to_pylist() if is_list and not column.null_count else None


def grouped_by_length(rows: Any, model: Any, args: TrainingArguments) -> LengthGroupedSampler | None:
    """The sampler of texts that are grouped by length; None if they are not, or have a column of lengths."""
    is_asked = args.train_sampling_strategy == "group_by_length"
    if not is_asked or args.length_column_name in getattr(rows, "column_names", ()):
        return None
    lengths = lengths_of(rows, getattr(model, "main_input_name", "input_ids"))
    size = args.train_batch_size * args.gradient_accumulation_steps
    return LengthGroupedSampler(size, lengths=lengths) if lengths else None


class EpochSampler(Sampler[int]):
    """The order of the rows in an epoch, as a function of `seed` and epoch alone.

    `sampler` draws the order, and would draw it from the process's own generator, which dropout and augmentation move
    on.  Accelerate's sampler of rows in random order adds the epoch to the seed in the same way.
    """

    def __init__(self, sampler: Any, seed: int):
        """`sampler` has an attribute `generator` that it draws from, if it draws at all."""
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        self.left_out: frozenset[int] = frozenset()  # places in the order whose rows are passed over

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch `epoch`, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return (row for place, row in enumerate(self.sampler) if place not in self.left_out)

    def __len__(self) -> int:
        """The rows of a whole epoch."""
        return len(self.sampler)


class EvenBatchSampler(BatchSampler):
    """Batches in groups, one for each of `num_processes` processes, whose rows together are those of one larger batch.

    What is left at the end of an epoch is shared out evenly; accelerate's own way fills it up with rows that were
    trained on before.  Where fewer rows than processes are left, they join the group before, or, if that belongs to
    another of the steps of `num_groups` groups, each process has all of them, whose mean is the same.

    >>> list(EvenBatchSampler(range(7), 2, False, num_processes=2))
    [[0, 1], [2, 3], [4], [5, 6]]
    >>> list(EvenBatchSampler(range(5), 1, False, num_processes=2, num_groups=4))
    [[0], [1], [2], [3, 4]]
    """

    def __init__(
        self,
        sampler: Sampler[int] | Iterable[int],
        batch_size: int,
        drop_last: bool,
        *,
        num_processes: int,
        num_groups: int = 1,
    ):
        super().__init__(sampler, batch_size, drop_last)
        self.num_processes, self.num_groups = num_processes, num_groups

    def __iter__(self) -> Iterator[list[int]]:
        before: list[int] = []
        for place, rows in enumerate(self._groups):
            if self._joins(place, len(rows)):
                before += rows
            else:
                yield from self._shares(before)
                before = rows
        yield from self._shares(before)

    def __len__(self) -> int:
        count, rest = len(self._groups), len(cast(Sized, self.sampler)) % self._groups.batch_size
        return self.num_processes * (count - (bool(rest) and self._joins(count - 1, rest)))

    @property
    def _groups(self) -> BatchSampler:
        return BatchSampler(self.sampler, self.batch_size * self.num_processes, self.drop_last)

    def _joins(self, place: int, num_rows: int) -> bool:
        """Whether a group of so few rows is part of the one before it."""
        return num_rows < self.num_processes and place % self.num_groups > 0 and not self.drop_last

    def _shares(self, rows: list[int]) -> Iterator[list[int]]:
        ends = [len(rows) * share // self.num_processes for share in range(self.num_processes + 1)]
        for first, last in pairwise(ends if rows else []):
            yield rows[first:last] if len(rows) >= self.num_processes else rows
