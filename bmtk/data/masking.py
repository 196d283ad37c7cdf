"""Hiding parts of a row at random, as a function of (seed, epoch, row) alone: no restart or batch size changes a mask.

B rows, L positions.  Source: Devlin et al. 2018, arXiv:1810.04805, sec. 3.1 and appendix A.1; whole words: the second
release of their code (2019).
"""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .epoch_dataset import EpochDataset
from .packing import IGNORE_INDEX, PackedRows
from .row_draws import row_draws
from .rows import Indices

BLANKS = ("\u0120", "\u2581")  # how byte-level and SentencePiece tokenizers write the blank that a token begins with
MASKED, RANDOM = 0.8, 0.1  # shares of the hidden tokens that become the mask token, and any other; the rest stays


class MaskedTokens(EpochDataset):
    """Packed rows with some tokens masked, to be predicted; `batch(...)` is int64 tensors (B, L).

    `labels`: the tokens that were hidden, -100 elsewhere.  `input_ids`: a hidden token is the mask token (80 %), any
    ordinary token (10 %) or itself (10 %); special tokens are never hidden.  `position_ids` as in PackedRows.
    Of n ordinary tokens, `probability` * n are hidden, rounded, and at least one; with `whole_words` the last word may
    exceed that.  For a DataLoader, which passes no epochs, `set_epoch` sets it.
    """

    def __init__(
        self,
        rows: PackedRows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        probability: float,
        whole_words: bool = False,
        seed: int,
    ):
        self.rows, self.store, self.seed = rows, rows.store, seed
        self.probability, self.mask_token_id = probability, tokenizer.mask_token_id
        self.is_special = np.zeros(len(tokenizer), bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.ordinary = np.flatnonzero(~self.is_special)
        self.ends = word_ends(tokenizer) if whole_words else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Indices) -> dict[str, torch.Tensor]:
        """What a DataLoader asks for: a batch already, which a collator leaves as it is."""
        return self.batch(indices, [self.epoch] * len(indices))

    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]:
        batch = self.rows[indices]
        ids = batch["input_ids"].numpy().copy()
        labels = np.full_like(ids, IGNORE_INDEX)
        for i, (row, epoch) in enumerate(zip(indices, epochs, strict=True)):
            draw = row_draws(self.seed, epoch, row)
            hidden = self._hidden(ids[i], draw)
            labels[i, hidden] = ids[i, hidden]  # before the ids are overwritten
            ids[i, hidden] = self._shown_instead(ids[i, hidden], draw)
        kept = {name: value for name, value in batch.items() if name == "position_ids"}
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), **kept}

    def _hidden(self, ids: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Positions (N,) in a row (L,) that are hidden: words in random order until there are enough."""
        places = np.flatnonzero(~self.is_special[ids])
        if not len(places):
            return places
        words = self._words(ids)[places]
        _, word, sizes = np.unique(words, return_inverse=True, return_counts=True)
        order = draw.permutation(len(sizes))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen = np.zeros(len(sizes), bool)
        chosen[order[before < max(1, round(self.probability * len(places)))]] = True
        return places[chosen[word]]

    def _words(self, ids: np.ndarray) -> np.ndarray:
        """The word of each token (L,), counted from the start of the row; without whole words every token is one."""
        if self.ends is None:
            return np.arange(len(ids))
        begins_inside, ends_inside = (end[ids] for end in self.ends)
        continues = begins_inside[1:] & ends_inside[:-1]
        return np.concatenate(([0], np.cumsum(~continues)))

    def _shown_instead(self, tokens: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """What the model reads in place of hidden tokens (N,)."""
        kind, others = draw.random(len(tokens)), draw.choice(self.ordinary, len(tokens))
        return np.where(kind < MASKED, self.mask_token_id, np.where(kind < MASKED + RANDOM, others, tokens))


def word_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token (V,) can continue the word before it, and whether that word may continue after it.

    A word is a run of letters and digits; of WordPiece tokenizers, a token and those with ## that follow it.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = set(tokenizer.all_special_tokens)
    if any(token.startswith("##") for token in tokens):
        return np.array([t.startswith("##") for t in tokens]), np.array([t not in special for t in tokens])
    begins, ends = [], []
    for token_id, token in enumerate(tokens):
        text = "" if token in special else str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        begins.append(text[:1].isalnum() and not token.startswith(BLANKS))
        ends.append(text[-1:].isalnum())
    return np.array(begins), np.array(ends)


def hidden_cells(num_cells: int, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """Which cells (num_cells,) of an image are hidden: `ratio` of them, rounded, and neither none nor all."""
    count = min(max(1, round(ratio * num_cells)), num_cells - 1)
    hidden = np.zeros(num_cells, np.int64)
    hidden[draw.permutation(num_cells)[:count]] = 1
    return hidden
