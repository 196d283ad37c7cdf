"""Products of matrices on a CPU, by the library that multiplies them fastest there."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch
from torch import nn

from .eager_cpu_bm import is_eager_on_cpu, is_plain_linear

# Floating-point operations of a product.  oneDNN writes code for each new shape, which takes up to a millisecond, and
# keeps it for its last thousand shapes: about 0.6 MB each.
LEAST_WORK = 2**27
LOG2_E = math.log2(math.e)  # e^x is 2^(x LOG2_E)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies `x`: autocast's, where that is on, which leaves float64 alone."""
    kind = x.device.type
    is_cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if is_cast else x.dtype


@cache
def casts_before_products() -> bool:
    """Whether to multiply bfloat16 matrices and cast the product, instead of `float32_products_of_bfloat16`.

    With AVX-512 alone that takes half the time.  AMX multiplies in less time than a cast of its results takes.
    """
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("avx512_bf16") and not processor.get("amx_bf16"))


@cache
def has_slow_mkl() -> bool:
    """Whether MKL, which computes torch's own products of float32 matrices, is slower than oneDNN.

    It has code with AVX-512 for Intel's processors only: 2.2 times the time on an AMD EPYC whose AVX-512 is as wide.
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    processor = torch.cpu.get_capabilities()  # which also have the name, as it happens
    return bool(libraries and processor.get("avx512_f") and "AMD" in processor.get("cpu_name", ""))


class Precision:
    """The precision of oneDNN's float32 products, which all threads share: the last one that leaves it restores it."""

    def __init__(self):
        self.lock, self.users, self.before = Lock(), 0, "none"

    def lower(self) -> None:
        setting = torch.backends.mkldnn.matmul
        with self.lock:
            if not self.users:
                self.before, setting.fp32_precision = setting.fp32_precision, "bf16"
            self.users += 1

    def restore(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                torch.backends.mkldnn.matmul.fp32_precision = self.before


PRECISION = Precision()


@contextmanager
def float32_products_of_bfloat16() -> Iterator[None]:
    """Let float32 matrices be multiplied by the processor's instructions for bfloat16.

    Where it has AMX they round their inputs, which changes nothing in those that held bfloat16 numbers, and sum in
    float32; elsewhere the products are those of float32.
    """
    PRECISION.lower()
    try:
        yield
    finally:
        PRECISION.restore()


def product(a: torch.Tensor, b: torch.Tensor, *, is_rare: bool = False) -> torch.Tensor:
    """a (n, k) @ b (k, m), plain tensors on a CPU; without gradients, so inside of autograd functions alone.

    `is_rare`: these shapes are not those of the next step, too, so that code for them would not pay.
    """
    return of_onednn(a, b) if is_for_onednn(a, b, is_rare) else a @ b


def float32_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, is_rare: bool = False) -> torch.Tensor:
    """As `product`, in float32; `out` (n, m) has room for it, which is used where that saves time."""
    if is_for_onednn(a, b, is_rare):
        return of_onednn(a, b)
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float = 1.0, *, is_rare=False) -> None:
    """Add factor * a @ b to `total` (n, m)."""
    if a.dtype == total.dtype and not is_for_onednn(a, b, is_rare):
        total.addmm_(a, b, alpha=factor)
    else:
        total.add_(product(a, b, is_rare=is_rare), alpha=factor)


def is_for_onednn(a: torch.Tensor, b: torch.Tensor, is_rare: bool) -> bool:
    if a.dtype != torch.float32 or b.dtype != torch.float32 or is_rare:
        return False
    return 2 * a.shape[0] * b.numel() >= LEAST_WORK and has_slow_mkl() and torch._C._get_mkldnn_enabled()


def of_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """layer(x) of x (..., D) and a linear layer, or a module in its place."""
    if not (is_eager_on_cpu(x) and x.ndim > 1 and has_slow_mkl() and is_plain_linear(layer)):
        return layer(x)
    if 2 * x.numel() * layer.out_features < LEAST_WORK or product_dtype(x) != torch.float32:
        return layer(x)
    if not (is_eager_on_cpu(layer.weight) and layer.weight.dtype == x.dtype == torch.float32):
        return layer(x)
    return Projection.apply(x.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x.shape[:-1])


class Projection(torch.autograd.Function):
    """x (N, D), weight (U, D), bias (U,) or None -> (N, U).  Of it there are second derivatives, as of nn.Linear."""

    @staticmethod
    def forward(ctx, x, weight, bias) -> torch.Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        output = product(x, weight.T)
        return output if bias is None else output.add_(bias)

    @staticmethod
    def backward(ctx, of_output):
        x, weight = ctx.saved_tensors
        multiply = torch.matmul if torch.is_grad_enabled() else product
        of_x = multiply(of_output, weight) if ctx.needs_input_grad[0] else None
        of_weight = multiply(of_output.T, x) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, of_output.sum(0) if ctx.needs_input_grad[2] else None


__all__ = [
    "LOG2_E",
    "add_product",
    "casts_before_products",
    "float32_product",
    "float32_products_of_bfloat16",
    "product",
    "product_dtype",
    "project",
]
