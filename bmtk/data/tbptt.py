"""Rows that go on where others ended, so that a recurrent network can carry its state from step to step.

The order of truncated backpropagation through time: the text is cut into as many streams as a step has rows, and each
step reads the next row of every stream (Zaremba et al. 2014, arXiv:1409.2329, sec. 4.1).
"""

import numpy as np
import torch

from .batches import GlobalBatches
from .packing import IGNORE_INDEX, PackedRows
from .rows import Indices


class TBPTTRows:
    """`rows` in `num_streams` streams: row n is the one that stream n % num_streams reads in step n // num_streams.

    Streams are contiguous, and their lengths differ by one row at most.  A stream that ends before the last step gets
    an empty row there: padding, of which nothing is predicted.  So every row is read once per epoch.
    `position_ids` are 0 where a stream or a document begins and count on from there, but not from row to row; a batch
    without such a beginning has none.
    """

    def __init__(self, rows: PackedRows, num_streams: int):
        self.rows, self.num_streams = rows, num_streams

    def __len__(self) -> int:
        return -(-len(self.rows) // self.num_streams) * self.num_streams

    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]:
        """Rows are the same in all epochs."""
        step, stream = np.divmod(np.asarray(indices, np.int64), self.num_streams)
        whole, longer = divmod(len(self.rows), self.num_streams)
        is_empty = step >= whole + (stream < longer)
        row = np.where(is_empty, 0, stream * whole + np.minimum(stream, longer) + step)
        batch = self.rows.read(row, goes_on=step > 0)
        empty = torch.from_numpy(is_empty)
        batch["input_ids"][empty] = self.rows.store.pad_token_id
        batch["labels"][empty] = IGNORE_INDEX
        return batch


class TBPTTBatches(GlobalBatches):
    """Batches of one row per stream, in the order of the text: each row goes on where its stream's last one ended."""

    carries_state = True

    def __init__(self, rows: PackedRows, *, batch_size: int, **sizes: int):
        super().__init__(TBPTTRows(rows, batch_size), batch_size=batch_size, shuffle=False, **sizes)
