"""Rows of one length, cut from the stored documents so that every token is a target exactly once per epoch.

B rows, L context length. Documents are laid end to end and cut every L tokens; a row reads one token more, as the
target of its last position. No token is dropped and none is padded but at the very end.
"""

from typing import Any

import numpy as np
import torch

from bmtk.errors import UserError

from .rows import Indices

IGNORE_INDEX = -100  # label of a position without a loss; the default of torch.nn.functional.cross_entropy


class PackedRows:
    """The rows of a store: `len(rows)` of them; `rows[[3, 0]]` is a batch of int64 tensors (B, L).

    `input_ids`: tokens [i*L, i*L + L) of the store; only the last row is padded.
    `labels` and `shift_labels`: the token after each position, already shifted; -100 where the next token begins
    another document, or where there is none. (Heads look for `labels`, the loss of transformers for `shift_labels`.)
    `position_ids`: count from 0 at the start of the row, of every document in it, and of the padding. They are
    what keeps documents apart, and are left out of a batch without such a start inside a row: plain causal attention
    is faster.
    Raises: UserError if context_length < 1.
    """

    def __init__(self, store: Any, context_length: int):
        """`store` is a TokenStore; that of several corpora knows no tokens, only what they hold together."""
        if context_length < 1:
            raise UserError(f"context_length={context_length} must be at least 1 token per row")
        self.store = store
        self.context_length = context_length

    def __len__(self) -> int:
        return -(-(self.store.num_tokens - 1) // self.context_length)

    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]:
        """Rows are the same in all epochs."""
        return self[indices]

    def __getitems__(self, indices: Indices) -> dict[str, torch.Tensor]:
        """What a DataLoader asks for: a batch already, which a collator leaves as it is."""
        return self[indices]

    def __getitem__(self, indices: Indices) -> dict[str, torch.Tensor]:
        return self.read(indices)

    def read(self, indices: Indices, *, goes_on: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """A batch of rows; `goes_on` (B,) marks those whose reader still holds the state of what precedes them.

        Of such rows, `position_ids` are 0 only where a document begins.
        """
        tokens, is_start = self._joined(indices)
        targets = np.where(is_start[:, 1:], IGNORE_INDEX, tokens[:, 1:])  # (B, L)
        targets[targets < 0] = IGNORE_INDEX  # padding
        input_ids = np.where(tokens < 0, self.store.pad_token_id, tokens)[:, :-1]
        labels = torch.from_numpy(targets)
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": labels, "shift_labels": labels}
        begins = is_start[:, :-1]
        if goes_on is not None:
            begins[:, 0] |= ~goes_on
        if begins[:, 1 if goes_on is None else 0 :].any():
            batch["position_ids"] = torch.from_numpy(_count_from_starts(begins, goes_on))
        return batch

    def _joined(self, indices: Indices) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, L + 1), -1 where there is none, and whether a document (or the padding) starts there."""
        tokens = np.full((len(indices), self.context_length + 1), -1, np.int64)  # ids of the store may be unsigned
        is_start = np.zeros(tokens.shape, bool)
        for i, row in enumerate(indices):
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} is not one of the {len(self)} rows")
            piece, starts = self.piece(int(row))
            tokens[i, : len(piece)] = piece
            is_start[i, starts] = True
        return tokens, is_start

    def piece(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a row and, if there is one, the token after it; and where documents (or padding) start."""
        first, last = row * self.context_length, (row + 1) * self.context_length + 1
        return self.store.tokens[first:last], self.store.starts(first, last)  # its end starts the padding

    def inputs(self, row: int) -> np.ndarray:
        """The tokens of a row, without padding."""
        first = row * self.context_length
        return np.asarray(self.store.tokens[first : first + self.context_length], np.int64)


def _count_from_starts(is_start: np.ndarray, goes_on: np.ndarray | None) -> np.ndarray:
    """Distance to the last True at or before each column: (B, L) bool to int64.

    Where there is none, to the first column; in a row that goes on, to the column before the first.
    """
    column = np.arange(is_start.shape[1])
    before = 0 if goes_on is None else -goes_on[:, None].astype(np.int64)
    return column - np.maximum.accumulate(np.where(is_start, column, before), axis=1)
