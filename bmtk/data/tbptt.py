"""Rows that go on where others ended, so that a recurrent network can carry its state from step to step.

The order of truncated backpropagation through time: the text is laid in as many lanes as a step has rows, and each
step reads the next row of every lane (Zaremba et al. 2014, arXiv:1409.2329, sec. 4.1).
"""

from collections.abc import Sequence

import numpy as np
import torch

from bmtk.data.batches import GlobalBatches
from bmtk.data.packing import IGNORED, PackedRows


class TBPTTRows:
    """`rows` in `num_lanes` lanes: row n of these is the one that lane n % num_lanes reads in step n // num_lanes.

    Lanes are contiguous and of equal length but for one row.  A lane that ends before the last step gets an empty row
    there: padding, of which nothing is predicted.  So every row is read once an epoch.
    `position_ids` are 0 where a lane or a document begins and count on from there, but not from row to row; a batch
    without such a beginning has none.
    """

    def __init__(self, rows: PackedRows, num_lanes: int):
        self.rows, self.num_lanes = rows, num_lanes

    def __len__(self) -> int:
        return -(-len(self.rows) // self.num_lanes) * self.num_lanes

    def batch(self, indices: Sequence[int], epochs: Sequence[int]) -> dict[str, torch.Tensor]:
        """Rows are the same in all epochs."""
        step, lane = np.divmod(np.asarray(indices, np.int64), self.num_lanes)
        whole, longer = divmod(len(self.rows), self.num_lanes)
        is_empty = step >= whole + (lane < longer)
        row = np.where(is_empty, 0, lane * whole + np.minimum(lane, longer) + step)
        batch = self.rows.read(row, goes_on=step > 0)
        empty = torch.from_numpy(is_empty)
        batch["input_ids"][empty] = self.rows.store.pad_token_id
        batch["labels"][empty] = IGNORED
        return batch


class TBPTTBatches(GlobalBatches):
    """Batches of one row of every lane, in the order of the text: each row goes on where its lane's last one ended."""

    carries_state = True

    def __init__(self, rows: PackedRows, *, batch_size: int, **sizes: int):
        super().__init__(TBPTTRows(rows, batch_size), batch_size=batch_size, shuffle=False, **sizes)
