"""Hashed n-grams: what a linear model reads of a text.  B rows, L positions, K outputs, V tokens.

An n-gram of token ids is a row of one table, found by a hash; those that share a row share its weights.  Sources: bags
of hashed n-grams, Joulin et al. 2016, arXiv:1607.01759, here with one weight per output as in a linear model; beside
a network, Cheng et al. 2016, arXiv:1606.07792 (wide and deep); with those of characters, Bojanowski et al. 2017,
arXiv:1607.04606; with skip-bigrams, pairs of tokens with others between, Guthrie et al. 2006, "A closer look at
skip-gram modelling".
"""

import torch
from torch import nn
from torch.nn import functional as F

from .zero_start_bm import StartsAtZero, ZeroEmbedding

PRIME, FACTOR = 2**31 - 1, 1_103_515_245  # their products stay below 2^63
GAP = 1_000  # so that those with tokens left out have rows of their own
# A weight moves by about the learning rate in a step, and that of a rare n-gram in few of them: without a factor they
# would hardly leave 0 at the rates that suit a network.
SCALE = 30.0
SPELLING = 1 / 3  # share of the characters in the mean: they are several times as many, and all move alike


class NgramReader(StartsAtZero, nn.Module):
    """Token ids (B, L) -> outputs (B, K): the rows of all n-grams, summed and divided by the root of their number.

    Those of tokens and those of characters are two such sums; the outputs are a weighted mean of these.
    """

    constant_buffers = frozenset(("spelling",))  # which no forward pass changes

    def __init__(self, sizes: list[int], buckets: int, outputs: int, *, skip=0, tokens: int = 0, spelling: int = 0):
        """`skip` is how many tokens lie between those of a skip-bigram, at most, and `spelling` how many n-grams of
        characters each of the `tokens` of the vocabulary has, at most."""
        super().__init__()
        self.ngrams = [*((size, 0) for size in sizes), *((2, skipped + 1) for skipped in range(skip))]
        self.table = ZeroEmbedding(buckets, outputs)  # n-grams that training does not see change nothing
        # Rows of the table, counted from 1, of a token's n-grams of characters; 0: none.  Whoever has the words of the
        # vocabulary writes them.
        self.register_buffer("spelling", torch.zeros(tokens, spelling, dtype=torch.int32) if spelling else None)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`mask` (B, L) is 0 at padding, which is like what lies before the row; None: every position is real."""
        real = torch.ones_like(input_ids) if mask is None else (mask != 0).long()
        tokens = (input_ids + 1) * real  # 0: no token
        buckets = self.table.num_embeddings
        sums = sum(self.table(bucket_of(tokens, size, buckets, skipped=skipped)) for size, skipped in self.ngrams)
        count = len(self.ngrams) * real.sum(1, keepdim=True).clamp(min=1)
        outputs = (sums * real[..., None]).sum(1) / count.sqrt()
        if self.spelling is not None:
            outputs = outputs.lerp(self.read_spelling(input_ids, real), SPELLING)
        return SCALE * outputs

    def read_spelling(self, input_ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The same of n-grams of characters; `real` (B, L) is 0 at padding."""
        rows = (self.spelling[input_ids] * real[..., None]).flatten(1)  # (B, L x n-grams of a token)
        is_ngram, table = rows > 0, self.table.weight
        # All rows are never in memory at once.
        sums = F.embedding_bag((rows - 1).clamp(min=0), table, mode="sum", per_sample_weights=is_ngram.to(table.dtype))
        return sums / is_ngram.sum(1, keepdim=True).clamp(min=1).sqrt()


def bucket_of(tokens: torch.Tensor, size: int, buckets: int, *, skipped: int = 0) -> torch.Tensor:
    """The row (B, L) of the n-gram of `size` tokens that ends at each position of (B, L); 0 before the first one.

    `skipped` tokens lie between one and the next.
    """
    key = torch.full_like(tokens, size + GAP * skipped)
    for back in reversed(range(0, size * (skipped + 1), skipped + 1)):
        key = (key * FACTOR + F.pad(tokens, (back, 0))[:, : tokens.shape[1]] + 1) % PRIME
    return key % buckets


__all__ = ["NgramReader", "bucket_of"]
