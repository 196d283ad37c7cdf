"""Connectionist temporal classification: losses of single rows, and decoding.

B rows, L positions, S labels, V tokens.  A path has a token or the blank at each position; it stands for the labels
that are left when repetitions are merged and blanks dropped (Graves et al. 2006).
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

from bmtk.data.packing import IGNORE_INDEX

Prefix = tuple[int, ...]  # labels that a text begins with


def positions_needed(labels: Sequence[int]) -> int:
    """The fewest positions whose paths can stand for `labels`: equal neighbours need a blank between them.

    >>> positions_needed([7, 7, 5])
    4
    """
    return len(labels) + sum(one == other for one, other in pairwise(labels))


def row_losses(logits: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, blank: int) -> torch.Tensor:
    """Negative log-likelihood (B,) of labels (B, S), padded by IGNORE_INDEX, given logits (B, L, V) of `lengths` (B,).

    Infinite for a row whose labels need more positions than it has.
    """
    log_probabilities = logits.float().log_softmax(-1).transpose(0, 1)
    sizes = (labels != IGNORE_INDEX).sum(-1)
    targets = labels.masked_fill(labels == IGNORE_INDEX, blank)
    return F.ctc_loss(log_probabilities, targets, lengths, sizes, blank=blank, reduction="none")


def best_path(logits: np.ndarray, blank: int) -> list[int]:
    """Labels of the likeliest path of (L, V): the likeliest token at each position."""
    path = logits.argmax(-1).tolist()
    return [token for i, token in enumerate(path) if token != blank and (i == 0 or token != path[i - 1])]


def prefix_beam_search(log_probabilities: np.ndarray, blank: int, width: int) -> tuple[list[int], float]:
    """The likeliest labels of (L, V), summed over all of their paths, and their log-likelihood.

    After each position the `width` likeliest beginnings are kept; with all of them the result is exact.
    Source: Hannun et al. 2014, arXiv:1408.2873, algorithm 1, without a language model.
    """
    # Beginning of the labels -> log-likelihood of its paths that end in the blank, and in its last token.
    beams: dict[Prefix, tuple[float, float]] = {(): (0.0, -np.inf)}
    for row in log_probabilities.astype(np.float64):
        grown: dict[Prefix, list[float]] = {}
        for prefix, (in_blank, in_token) in beams.items():
            either = np.logaddexp(in_blank, in_token)
            stays = grown.setdefault(prefix, [-np.inf, -np.inf])
            stays[0] = np.logaddexp(stays[0], either + row[blank])
            for token, value in enumerate(row):
                if token == blank:
                    continue
                if prefix and token == prefix[-1]:  # its repetition, or the same token again after a blank
                    stays[1] = np.logaddexp(stays[1], in_token + value)
                    before = in_blank
                else:
                    before = either
                longer = grown.setdefault((*prefix, token), [-np.inf, -np.inf])
                longer[1] = np.logaddexp(longer[1], before + value)
        totals = {prefix: np.logaddexp(ends[0], ends[1]) for prefix, ends in grown.items()}
        likeliest = sorted(totals, key=totals.__getitem__, reverse=True)
        beams = {prefix: (grown[prefix][0], grown[prefix][1]) for prefix in likeliest[:width]}
    best = next(iter(beams))
    return list(best), float(np.logaddexp(*beams[best]))
