"""What the layers of a trunk have in common, whatever they read."""

from torch import nn


class TrunkLayer(nn.Module):
    """A module whose output is one of the trunk's `hidden_states`; transformers wants one class for all of them."""


__all__ = ["TrunkLayer"]
