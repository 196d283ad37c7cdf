"""Layers whose weights start at 0: what they add to a model is learned, and nothing before."""

from torch import nn


class StartsAtZero:
    """Stands first among the bases of a layer; the roots of the families set its parameters and buffers to 0."""


class ZeroLinear(StartsAtZero, nn.Linear):
    """A linear layer that starts at 0."""


class ZeroEmbedding(StartsAtZero, nn.Embedding):
    """A table that starts at 0."""


__all__ = ["StartsAtZero", "ZeroEmbedding", "ZeroLinear"]
