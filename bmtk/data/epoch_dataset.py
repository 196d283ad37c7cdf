"""Rows that are drawn anew in every epoch."""

from typing import ClassVar, TypeVar

import torch

AnyEpochDataset = TypeVar("AnyEpochDataset", bound="EpochDataset")


class EpochDataset:
    """Rows that depend on the epoch, which training sets with `set_epoch` at the beginning of each."""

    first_epoch: ClassVar[int] = 0  # until it is set

    _epoch: torch.Tensor

    def __new__(cls: type[AnyEpochDataset], *args: object, **kwargs: object) -> AnyEpochDataset:
        rows = super().__new__(cls)
        # In shared memory: persistent DataLoader workers hold a copy of the data set, made before the epoch changed.
        rows._epoch = torch.tensor(cls.first_epoch).share_memory_()
        return rows

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
