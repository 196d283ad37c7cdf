"""A linear layer that says itself how it starts.

transformers' `initialize_weights` passes by every module of a custom model that has no parameter of its own (5.23), so
a block cannot start the layers within it anew: what starts otherwise than its kind must know so itself.
Source: He et al. 2015, arXiv:1502.01852, eq. 10 and 12.
"""

from torch import nn


class KaimingLinear(nn.Linear):
    """Starts from N(0, gain / fan_in), times `scale`: gain 2 keeps the variance before a ReLU, 1 without one."""

    def __init__(self, inputs: int, outputs: int, *, bias=True, gain=2.0, fan_in: int | None = None, scale=1.0):
        super().__init__(inputs, outputs, bias=bias)
        self.std = scale * (gain / (inputs if fan_in is None else fan_in)) ** 0.5


__all__ = ["KaimingLinear"]
