"""Where the models may compute on a CPU in another way than from torch's single operations, with the same result."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

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
    """Whether calling the layer is `x @ weight.T + bias` and nothing else: no adapter, hook or quantization.

    Nor a parametrization, which may change with each time that the weight is read, as the spectral norm does.
    """
    return type(layer).forward is nn.Linear.forward and is_unhooked(layer) and not is_parametrized(layer)


def once_differentiable(backward: Callable) -> Callable:
    """Refuse `create_graph`, for a backward pass whose result has no graph.

    torch's decorator of this name refuses the second derivative only where it has to pass through the result; where it
    does not, as in the gradient of a loss, the result would be a constant without a word.
    """

    @wraps(backward)
    def refusing(ctx, *gradients: torch.Tensor):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: second derivatives on a CPU are computed by torch.func alone; use torch.func.grad "
                "of torch.func.functional_call, and attn_implementation='eager' in a Transformer"
            )
        return backward(ctx, *gradients)

    return refusing


def numbers_at_once() -> int:
    """How many numbers an operation of several passes has in hand, so that all of them stay in the caches."""
    return PIECE * torch.get_num_threads()


__all__ = ["DTYPES", "is_eager_on_cpu", "is_plain_linear", "is_unhooked", "numbers_at_once", "once_differentiable"]
