"""Texts with some of their tokens hidden, others in every epoch: an augmentation.

Source: Iyyer et al. 2015, "Deep unordered composition rivals syntactic methods" (word dropout).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from datasets import Dataset

from .epoch_dataset import EpochDataset
from .number_rows import NumberBatch, NumberLists, NumberRows
from .row_draws import draws_of_rows


@dataclass
class TokenDropout(EpochDataset):
    """`rows` whose `input_ids` (or each of their lists) become `hidden` with probability `share`; `kept` never do.

    What is hidden depends on the seed, the epoch and the row only, so a run that is resumed goes on the same way.
    """

    rows: Dataset
    share: float
    hidden: int
    kept: frozenset[int]
    seed: int

    def __post_init__(self) -> None:
        self.as_they_are, self.kept_ids = NumberRows(self.rows), np.array(sorted(self.kept), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]:
        rows = self.as_they_are.__getitems__(indices)
        if isinstance(rows, NumberBatch) and isinstance(ids := rows.columns["input_ids"], NumberLists):
            return NumberBatch({**rows.columns, "input_ids": self._hidden(ids, indices)})
        return [self._hide(index, row) for index, row in zip(indices, rows, strict=True)]

    def _hide(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        ids = row["input_ids"]
        if not ids or not isinstance(ids[0], list):
            return {**row, "input_ids": self._hidden(NumberLists.of([ids]), [index])[0]}
        found = iter(self._hidden(NumberLists.of([list(chain.from_iterable(ids))]), [index])[0])
        return {**row, "input_ids": [list(islice(found, len(one))) for one in ids]}

    def _hidden(self, ids: NumberLists, indices: Sequence[int]) -> NumberLists:
        """The `ids` of the rows `indices`, with some hidden."""
        draws_and_lengths = zip(draws_of_rows(self.seed, self.epoch, indices), ids.lengths.tolist(), strict=True)
        draws = [draw.random(length) for draw, length in draws_and_lengths]
        hides = (np.concatenate(draws or [np.zeros(0)]) < self.share) & ~np.isin(ids.numbers, self.kept_ids)
        return NumberLists(np.where(hides, self.hidden, ids.numbers), ids.lengths)
