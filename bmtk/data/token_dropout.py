"""Texts with some of their tokens hidden, others in every epoch: an augmentation.

Source: Iyyer et al. 2015, "Deep unordered composition rivals syntactic methods" (word dropout).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .epoch_dataset import EpochDataset
from .number_rows import NumberRows


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
        self.as_they_are = NumberRows(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.as_they_are.__getitems__(indices)
        return [self._hide(index, row) for index, row in zip(indices, rows, strict=True)]

    def _hide(self, index: int, row: dict[str, Any]) -> dict[str, Any]:
        draw = np.random.default_rng([self.seed, self.epoch, index])
        ids = row["input_ids"]
        is_nested = bool(ids) and isinstance(ids[0], list)
        return {**row, "input_ids": [self._hidden(one, draw) for one in ids] if is_nested else self._hidden(ids, draw)}

    def _hidden(self, ids: list[int], draw: np.random.Generator) -> list[int]:
        hides = (draw.random(len(ids)) < self.share).tolist()
        return [
            self.hidden if hide and token not in self.kept else token for token, hide in zip(ids, hides, strict=True)
        ]
