"""Layers whose weights start at 0: what they add to a model is learned, and nothing before."""

from torch import nn


class StartsAtZero:
    """Precedes a layer of torch in the bases; the roots of the families set its parameters to 0."""


class ZeroLinear(StartsAtZero, nn.Linear):
    """A linear layer that starts at 0."""


class ZeroEmbedding(StartsAtZero, nn.Embedding):
    """A table that starts at 0."""


__all__ = ["StartsAtZero", "ZeroEmbedding", "ZeroLinear"]
