"""Span corruption: spans of a row are replaced by sentinels and predicted, as a function of (seed, epoch, row) alone.

B rows, L tokens of a packed row.  Source: Raffel et al. 2020, arXiv:1910.10683, sec. 3.1.4 and 3.3.4.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from bmtk.errors import UserError

from .epoch_dataset import EpochDataset
from .packing import IGNORE_INDEX, PackedRows
from .rows import Indices


class CorruptedSpans(EpochDataset):
    """Packed rows for an encoder-decoder; `batch(...)` is int64 tensors, padded to the longest row.

    `input_ids` and `attention_mask`: the row with a sentinel in place of each span.  `labels`: each sentinel followed
    by its span, then the end token, padded with -100.  Every row is corrupted anew in every epoch; for a
    DataLoader, which passes no epochs, `set_epoch` sets it.
    Raises: UserError for a density outside (0, 1), spans shorter than a token, or too few sentinels for a row.
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        sentinels: Sequence[int],
        end_token_id: int,
        noise_density: float,
        mean_span_length: float,
        seed: int,
    ):
        check_noise(noise_density, mean_span_length)
        self.rows, self.store, self.seed = rows, rows.store, seed
        self.sentinels, self.end_token_id = np.asarray(sentinels, np.int64), end_token_id
        self.noise_density, self.mean_span_length = noise_density, mean_span_length
        needed = num_spans(rows.context_length, noise_density, mean_span_length)[1]
        if len(sentinels) < needed:
            raise UserError(
                f"a row of {rows.context_length} tokens has {needed} spans, the tokenizer {len(sentinels)} sentinels; "
                "lower noise_density or context_length, or raise mean_span_length"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Indices) -> dict[str, torch.Tensor]:
        """What a DataLoader asks for: a batch already, which a collator leaves as it is."""
        return self.batch(indices, [self.epoch] * len(indices))

    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]:
        sources, targets = [], []
        for row, epoch in zip(indices, epochs, strict=True):
            tokens = self.rows.inputs(int(row))
            draw = np.random.default_rng((self.seed, int(epoch), int(row)))
            is_noise = noise_mask(len(tokens), self.noise_density, self.mean_span_length, draw)
            sources.append(torch.from_numpy(with_sentinels(tokens, is_noise, self.sentinels)))
            target = with_sentinels(tokens, ~is_noise, self.sentinels)
            targets.append(torch.from_numpy(np.append(target, self.end_token_id)))
        return {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=self.store.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
        }


def num_spans(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """How many of `length` tokens are removed, and in how many spans; at least one token is kept before each span."""
    num_noise = min(max(1, round(length * noise_density)), max(0, length - 1))
    return num_noise, min(max(1, round(num_noise / mean_span_length)), num_noise, length - num_noise)


def noise_mask(length: int, noise_density: float, mean_span_length: float, draw: np.random.Generator) -> np.ndarray:
    """Which tokens (length,) are removed: kept and removed spans alternate, a kept one first, a removed one last."""
    num_noise, spans = num_spans(length, noise_density, mean_span_length)
    if not spans:  # nothing can be removed from one token
        return np.zeros(length, bool)
    lengths = np.stack([_parts(length - num_noise, spans, draw), _parts(num_noise, spans, draw)], axis=1)
    return np.repeat(np.tile([False, True], spans), lengths.reshape(-1))


def with_sentinels(tokens: np.ndarray, is_cut: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """`tokens` (L,) with the i-th sentinel in place of the i-th run of `is_cut` (L,)."""
    begins = is_cut & ~np.concatenate(([False], is_cut[:-1]))
    replaced = tokens.copy()
    replaced[begins] = sentinels[: begins.sum()]
    return replaced[begins | ~is_cut]


def _parts(total: int, count: int, draw: np.random.Generator) -> np.ndarray:
    """`count` lengths of at least 1 that add up to `total`, each such division as likely as any other."""
    cuts = np.sort(draw.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def check_noise(noise_density: float, mean_span_length: float) -> None:
    """Raises: UserError for a share that is none, or spans shorter than a token."""
    if not 0 < noise_density < 1 or mean_span_length < 1:
        raise UserError(
            f"noise_density={noise_density} must be between 0 and 1, mean_span_length={mean_span_length} at least 1"
        )
