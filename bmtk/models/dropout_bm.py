"""Dropout (Srivastava et al. 2014) whose draws do not take longest on a CPU.

torch (2.13) draws one Bernoulli number after the other there, from 32 or 64 bits each; this draws 16 bits a number.
They come from torch's own generator: a step repeats with the generator's state, as everywhere.
"""

import torch
from torch import nn

from .eager_cpu_bm import is_eager_on_cpu, numbers_at_once, once_differentiable

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
        return KeepSome.apply(x, min(round(self.p * LEVELS), LEVELS - 1))


class KeepSome(torch.autograd.Function):
    """x, in which each number is 0 with the probability dropped / LEVELS, over the probability that it is not.

    Computed in pieces that fit the cache; what is drawn does not depend on their size.
    """

    @staticmethod
    def forward(ctx, x, dropped: int) -> torch.Tensor:
        mask = torch.empty(-(-x.numel() // 4) * 4, dtype=torch.int16)
        for words in mask.view(torch.int64).split(numbers_at_once() // 4):
            words.random_(-(2**63), None)  # all bits of a word are random
            draws = words.view(torch.int16).bitwise_and_(LEVELS - 1)
            # The sign bit of `dropped - 1 - draw`, copied to all bits by the shift: all are set where it is kept.
            draws.neg_().add_(dropped - 1).bitwise_right_shift_(15)
        ctx.scale = LEVELS / (LEVELS - dropped)
        ctx.save_for_backward(mask)
        return masked(x, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output):
        return masked(of_output, *ctx.saved_tensors, ctx.scale), None


def masked(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """x (N numbers) times `scale` where the bits of the mask (N or more) are set, else 0."""
    output = torch.empty(x.shape, dtype=x.dtype)
    pieces = (whole.split(numbers_at_once()) for whole in (x.reshape(-1), output.view(-1), mask))
    for part, found, kept in zip(*pieces, strict=True):
        bits = torch.mul(part, scale, out=found).view(INTEGERS[x.dtype])
        bits.bitwise_and_(kept[: len(bits)].to(bits.dtype))
    return output


__all__ = ["BmDropout"]
