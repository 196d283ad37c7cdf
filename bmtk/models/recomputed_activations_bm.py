"""Activations of an MLP that are computed again in the backward pass instead of being kept."""

import torch
from torch.nn import functional as F

from .eager_cpu_bm import is_eager_on_cpu, once_differentiable


class SwiGLU:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

    @staticmethod
    def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate).mul_(up)

    @staticmethod
    def recompute(gate: torch.Tensor, up: torch.Tensor, of_product: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The product, and the gradients of gate and up."""
        activated = F.silu(gate)
        of_up = of_product * activated
        return activated.mul_(up), torch.ops.aten.silu_backward(of_product * up, gate), of_up


class SquaredReLU:
    """relu(hidden)^2 (So et al. 2021, arXiv:2109.08668)."""

    @staticmethod
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(hidden).square_()

    @staticmethod
    def recompute(hidden: torch.Tensor, of_product: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The square, and the gradient of hidden."""
        positive = F.relu(hidden)
        return positive.square(), positive.mul_(of_product).mul_(2)


def gated_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    if gate.dtype == up.dtype and is_eager_on_cpu(gate, up):
        return GatedProduct.apply(gate, up)
    return F.silu(gate) * up


class GatedProduct(torch.autograd.Function):
    """Computes silu(gate) again instead of keeping it: a quarter of what an MLP keeps, for a hundredth of a step."""

    @staticmethod
    def forward(ctx, gate, up) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return SwiGLU.forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_output):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(of_output * up, gate), F.silu(gate).mul_(of_output)


__all__ = ["SquaredReLU", "SwiGLU", "gated_product"]
