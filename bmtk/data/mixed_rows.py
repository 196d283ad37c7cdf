"""Rows of several token stores, in an order that mixes them by weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .batches import GlobalBatches
from .mixture import Mixture
from .packing import PackedRows
from .rows import Rows
from .shuffle import permuted_index


class JoinedStores:
    """What several token stores hold together."""

    def __init__(self, members: Sequence[PackedRows]):
        stores = [rows.store for rows in members]
        self.pad_token_id = stores[0].pad_token_id
        self.num_documents = sum(store.num_documents for store in stores)
        self.num_tokens = sum(store.num_tokens for store in stores)
        self.num_bytes = sum(store.num_bytes for store in stores)


class MixedRows(PackedRows):
    """The rows of several corpora, numbered one corpus after the other."""

    def __init__(self, members: Sequence[PackedRows]):
        super().__init__(JoinedStores(members), members[0].context_length)
        self.members = list(members)
        self.ends = np.cumsum([len(rows) for rows in members])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def piece(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        rows, place = self._member(row)
        return rows.piece(place)

    def inputs(self, row: int) -> np.ndarray:
        rows, place = self._member(row)
        return rows.inputs(place)

    def _member(self, row: int) -> tuple[PackedRows, int]:
        """The rows of its corpus, and which of them it is."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        rows = self.members[number]
        return rows, row - (int(self.ends[number]) - len(rows))


class MixedBatches(GlobalBatches):
    """Batches whose rows come from corpora by weights, each corpus epoch after epoch in shuffles of its own.

    `rows` number the rows of all corpora as MixedRows do.  The corpus of a row depends on its position alone, its
    place there on (seed, epoch of the corpus).  `steps_per_epoch` is for as many rows as all corpora have.
    Raises: UserError for a step behind the end of a mixture that has one.
    """

    def __init__(self, rows: Rows, *, mixture: Mixture, batch_size: int, **sizes: Any):
        super().__init__(rows, batch_size=batch_size, **sizes)
        self.mixture = mixture

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        corpus, number = self.mixture.at(self.positions(step))
        epoch, place = np.divmod(number, self.mixture.sizes[corpus])
        if self.shuffle:
            for i in np.unique(corpus):
                here, size = corpus == i, int(self.mixture.sizes[i])
                place[here] = permuted_index(place[here], num_rows=size, seed=self.seed, epoch=epoch[here])
        return self.mixture.first_rows[corpus] + place, epoch
