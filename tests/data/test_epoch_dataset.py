"""Rows that know their epoch, in whichever process they are read."""

from dataclasses import dataclass

from torch.utils.data import DataLoader

from bmtk.data.epoch_dataset import EpochDataset


@dataclass
class Numbers(EpochDataset):
    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return 10 * self.epoch + index


def test_workers_that_outlive_an_epoch_know_the_next_one():
    rows, other = Numbers(3), Numbers(count=3)
    loader = DataLoader(rows, 3, collate_fn=list, num_workers=1, persistent_workers=True)
    assert list(loader) == [[0, 1, 2]]
    rows.set_epoch(4)
    assert list(loader) == [[40, 41, 42]]
    assert (rows.epoch, other.epoch) == (4, 0)
