"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), and a shorter way to compute it in training on a CPU."""

from collections.abc import Iterator

import torch
from torch import nn

from .eager_cpu_bm import DTYPES, is_eager_on_cpu, numbers_at_once, once_differentiable
from .products_bm import product_dtype


class BmRMSNorm(nn.RMSNorm):
    """RMSNorm that casts its weight to the input's dtype: under autocast inputs have 16 bits, and weights 32.

    With `feeds_products`, only linear layers read its output, which then has the dtype that they multiply in: the
    cast, which each of them would make anew, is made once.
    """

    def __init__(self, normalized_shape: int, eps: float, *, feeds_products: bool = False):
        super().__init__(normalized_shape, eps=eps)
        self.feeds_products = feeds_products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = product_dtype(x) if self.feeds_products else x.dtype
        if is_eager_on_cpu(x, self.weight) and {x.dtype, self.weight.dtype} <= set(DTYPES):
            return RMSNormOnCPU.apply(x, self.weight, self.eps, dtype)
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(dtype)


class RMSNormOnCPU(torch.autograd.Function):
    """x (..., D), weight (D,) -> x over its root mean square, times the weight, in `dtype`; computed in float32.

    torch (2.13) composes it on a CPU of operations of which each reads and writes all of x, and keeps their results.
    """

    @staticmethod
    def forward(ctx, x, weight, eps: float, dtype: torch.dtype) -> torch.Tensor:
        scale = scale_of(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed(x, weight, scale, dtype)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, of_output):
        return *gradients_of_norm(*ctx.saved_tensors, of_output, ctx.needs_input_grad), None, None


def scale_of(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 over the root mean square of x (..., D) -> (..., 1), float32."""
    norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normed(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    output = torch.empty(x.shape, dtype=dtype)
    for part, of_part, found in in_pieces(x, scale, output):
        found.copy_((part.float() * of_part).mul_(weight))
    return output


def gradients_of_norm(x, weight, scale, of_output, needed=(True, True)) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x (..., D) and of the norm's weight (D,) that are needed, else None."""
    of_x = torch.empty(x.shape, dtype=x.dtype) if needed[0] else None
    of_weight = torch.zeros(weight.shape, dtype=torch.float32) if needed[1] else None
    wide_weight = weight.float()
    for part, of_part, output, found in in_pieces(x, scale, of_output, of_x):
        unit, output = part.float() * of_part, output.float()
        products = output * unit
        if of_weight is not None:
            of_weight += products.sum(0)
        if of_x is not None:
            mean = (products @ wide_weight).div_(x.shape[-1]).unsqueeze(-1)
            found.copy_(torch.mul(output, weight, out=products).addcmul_(unit, mean, value=-1).mul_(of_part))
    return of_x, None if of_weight is None else of_weight.to(weight.dtype)


def in_pieces(*tensors: torch.Tensor | None) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Some rows at a time of tensors (..., D), so that what is computed of them stays in the cache."""
    flat = [None if x is None else x.reshape(-1, x.shape[-1]) for x in tensors]
    rows = max(1, numbers_at_once() // flat[0].shape[-1])
    for start in range(0, len(flat[0]), rows):
        yield tuple(None if x is None else x[start : start + rows] for x in flat)


NORMS = {"rms_norm": BmRMSNorm, "layer_norm": nn.LayerNorm}


__all__ = ["NORMS", "BmRMSNorm"]
