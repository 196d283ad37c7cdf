"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), and a shorter way to compute it in training on a CPU."""

import torch
from torch import nn

from .eager_cpu_bm import is_eager_on_cpu, product_dtype

DTYPES = (torch.float32, torch.bfloat16)


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
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_output):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        of_output = of_output.float()
        products = of_output * normed
        of_weight = products.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None, None
        mean = (products @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)
        of_x = torch.mul(of_output, weight, out=products).addcmul_(normed, mean, value=-1).mul_(scale)
        return of_x.to(x.dtype), of_weight, None, None


NORMS = {"rms_norm": BmRMSNorm, "layer_norm": nn.LayerNorm}


__all__ = ["NORMS", "BmRMSNorm"]
