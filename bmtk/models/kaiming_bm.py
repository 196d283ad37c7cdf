"""A linear layer with its own initial standard deviation.

transformers' `initialize_weights` skips modules of custom models that own no parameters (5.23), so a block cannot
initialize the layers inside it.  A layer that differs from others of its type has to store its own initialization.
Source: He et al. 2015, arXiv:1502.01852, eq. 10 and 12.
"""

from torch import nn


class KaimingLinear(nn.Linear):
    """Weights from N(0, gain / fan_in) times `scale`: gain 2 preserves the variance before a ReLU, 1 without one."""

    def __init__(self, inputs: int, outputs: int, *, bias=True, gain=2.0, fan_in: int | None = None, scale=1.0):
        super().__init__(inputs, outputs, bias=bias)
        self.std = scale * (gain / (inputs if fan_in is None else fan_in)) ** 0.5


__all__ = ["KaimingLinear"]
