"""Rotation of queries and keys by their positions: Su et al. 2021, arXiv:2104.09864.  B rows, H heads, L positions."""

import torch

from .eager_cpu_bm import DTYPES, is_eager_on_cpu, numbers_at_once


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of (B, H, L, d) by their angles, the layout of transformers' Llama."""
    if is_eager_on_cpu(x, cos, sin) and x.dtype in DTYPES:
        return Rotation.apply(x, cos, sin)
    return x * cos + turned(x) * sin


def turned(x: torch.Tensor) -> torch.Tensor:
    """Each pair by a quarter."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Rotation(torch.autograd.Function):
    """x (B, H, L, d), cosines and sines (B or 1, 1, L, d), which are not trained -> the dtype of x, rounded once."""

    @staticmethod
    def forward(ctx, x, cos, sin) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, of_output):
        cos, sin = ctx.saved_tensors
        return rotated(of_output, cos, -sin), None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation in float32; (B, L, H, d) in memory, as the projections before and after it read and write."""
    x = x.transpose(1, 2)
    output = torch.empty(x.shape, dtype=x.dtype)
    rows = max(1, numbers_at_once() // max(1, x.shape[1:].numel()))
    # Repeated for the heads, because a loop over the numbers of one head alone is too short to be fast.
    cos, sin = (angles.transpose(1, 2).float().expand(-1, -1, *x.shape[2:]).contiguous() for angles in (cos, sin))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        of_part = [angles if len(angles) == 1 else angles[start : start + rows] for angles in (cos, sin)]
        found = torch.mul(part, of_part[0]) if x.dtype == torch.float32 else part.float().mul_(of_part[0])
        output[start : start + rows] = found.addcmul_(turned(part).float(), of_part[1])
    return output.transpose(1, 2)


__all__ = ["rotate"]
