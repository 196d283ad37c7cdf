"""Where the models may compute on a CPU in another way than from torch's single operations, with the same result."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16)  # that these ways compute in
PIECE = 2**17  # numbers of a thread: half a megabyte in float32


def is_eager_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether these plain tensors are computed with now, on a CPU: nothing is compiled, exported or traced."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    return all(tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class, and nothing else."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" not in vars(module) and not any(hooks) and not nn.modules.module._has_any_global_hook()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer is `x @ weight.T + bias` and nothing else: no adapter, hook or quantization."""
    return type(layer).forward is nn.Linear.forward and is_unhooked(layer)


def numbers_at_once() -> int:
    """How many numbers an operation of several passes has in hand, so that all of them stay in the caches."""
    return PIECE * torch.get_num_threads()


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies `x`: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def casts_before_products() -> bool:
    """Whether bfloat16 matrices are multiplied faster than float32 ones that are rounded within the product.

    So it is with AVX-512 alone (half the time).  AMX multiplies in less time than a cast of its results takes.
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


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


__all__ = [
    "DTYPES",
    "casts_before_products",
    "float32_products_of_bfloat16",
    "is_eager_on_cpu",
    "is_plain_linear",
    "is_unhooked",
    "numbers_at_once",
    "product_dtype",
]
