"""Dropout (Srivastava et al. 2014) whose draws do not take longest on a CPU.

torch (2.13) draws one Bernoulli number after the other there, from 32 or 64 bits each; this draws 16 bits a number.
They come from torch's own generator: a step repeats with the generator's state, as everywhere.
"""

import torch
from torch import nn

from .eager_cpu_bm import is_eager_on_cpu

LEVELS = 2**15  # probabilities are multiples of 1 / LEVELS
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}  # of as many bits


class BmDropout(nn.Dropout):
    """nn.Dropout; what is kept is divided by the very probability of keeping it, so that means stay exact."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        # Nothing here may depend on whether gradients are recorded: activation checkpointing draws twice.
        if self.inplace or x.dtype not in INTEGERS or not is_eager_on_cpu(x):
            return super().forward(x)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        return KeepSome.apply(x, kept(x, dropped), LEVELS / (LEVELS - dropped))


def kept(x: torch.Tensor, dropped: int) -> torch.Tensor:
    """A mask like x of integers as wide as its numbers: 0 with the probability dropped / LEVELS, else all bits set."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all bits of a word are random
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    draws.bitwise_and_(LEVELS - 1)  # 0 to LEVELS - 1
    # The sign bit of `dropped - 1 - draw`, copied to all bits by the shift.
    return draws.neg_().add_(dropped - 1).bitwise_right_shift_(15).to(INTEGERS[x.dtype])


class KeepSome(torch.autograd.Function):
    """x where the bits of the mask are set, times `scale`; else 0."""

    @staticmethod
    def forward(ctx, x, mask, scale: float) -> torch.Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return masked(x, mask, scale)

    @staticmethod
    def backward(ctx, of_output):
        (mask,) = ctx.saved_tensors
        return masked(of_output, mask, ctx.scale), None, None


def masked(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return (x * scale).view(mask.dtype).bitwise_and_(mask).view(x.dtype)


__all__ = ["BmDropout"]
