"""Products of matrices on a CPU, by the library that multiplies them fastest there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn

from .eager_cpu_bm import is_eager_on_cpu, is_plain_linear

LEAST_WORK = 2**25  # floating-point operations: oneDNN takes a millisecond to write the code for a new shape


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies `x`: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@cache
def casts_before_products() -> bool:
    """Whether bfloat16 matrices are multiplied faster than float32 ones that are rounded within the product.

    So it is with AVX-512 alone (half the time).  AMX multiplies in less time than a cast of its results takes.
    """
    processor = capabilities()
    return bool(processor.get("avx512_bf16") and not processor.get("amx_bf16"))


@cache
def has_slow_float32() -> bool:
    """Whether torch's own products of float32 matrices are slower than oneDNN's.

    MKL computes them, and has code with AVX-512 for Intel's processors only (2.2 times the time on an AMD EPYC 9005).
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    processor = capabilities()
    return bool(libraries and processor.get("avx512_f") and "AMD" in processor.get("cpu_name", ""))


def capabilities() -> dict:
    """What the processor can do, by the names of `torch.cpu.get_capabilities`, which torch 2.11 may lack."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


@contextmanager
def float32_products_of_bfloat16() -> Iterator[None]:
    """Let float32 matrices be multiplied by the processor's instructions for bfloat16.

    They round their inputs, which changes nothing in those that held bfloat16 numbers, and sum in float32.
    """
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, k) @ b (k, m); plain tensors on a CPU, as in the other functions here."""
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "") if is_for_onednn(a, b) else a @ b


def float32_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a @ b (n, m) in float32; `out` has room for it, which is used where that saves time."""
    if is_for_onednn(a, b):
        return product(a, b)
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(product(a, b))


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`total` (n, m) with factor * a @ b added to it."""
    if a.dtype == total.dtype and not is_for_onednn(a, b):
        return total.addmm_(a, b, alpha=factor)
    return total.add_(product(a, b), alpha=factor)


def is_for_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    work = 2 * a.shape[0] * b.numel()
    return a.dtype == b.dtype == torch.float32 and work >= LEAST_WORK and has_slow_float32()


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x) of x (..., D) and a linear layer, or a module in its place."""
    if not (has_slow_float32() and is_plain_linear(layer) and is_eager_on_cpu(x, layer.weight)):
        return layer(x)
    if product_dtype(x) != torch.float32 or not is_for_onednn(x.flatten(0, -2), layer.weight.T):
        return layer(x)
    return Projection.apply(x, layer.weight, layer.bias)


class Projection(torch.autograd.Function):
    """x (..., D), weight (U, D), bias (U,) or None -> (..., U)."""

    @staticmethod
    def forward(ctx, x, weight, bias) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        output = product(x.flatten(0, -2), weight.T)
        return (output if bias is None else output.add_(bias)).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_output):
        x, weight = ctx.saved_tensors
        rows, of_output = x.flatten(0, -2), of_output.flatten(0, -2)
        of_x = product(of_output, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = product(of_output.T, rows) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, of_output.sum(0) if ctx.needs_input_grad[2] else None


__all__ = [
    "add_product",
    "casts_before_products",
    "float32_product",
    "float32_products_of_bfloat16",
    "product",
    "product_dtype",
    "project",
]
