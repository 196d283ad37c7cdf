"""RMSNorm and MLP in training on a CPU as one function.  N positions, D width, I width between the projections.

It keeps its input and the outputs of the first projections, and computes the normed input and the activation again in
the backward pass: two thirds of the memory that the single operations keep.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .eager_cpu_bm import DTYPES, is_eager_on_cpu, is_plain_linear, is_unhooked, once_differentiable
from .norms_bm import BmRMSNorm, gradients_of_norm, normed, scale_of
from .products_bm import add_product, product, product_dtype


def fits_normed_mlp(x: torch.Tensor, norm: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Whether NormedMLP computes what these modules do: in training of all weights, without bias, adapter or hook."""
    if type(norm) is not BmRMSNorm or not is_unhooked(norm) or not torch.is_grad_enabled():
        return False
    if not all(is_plain_linear(layer) and layer.bias is None for layer in layers):
        return False
    weights = [norm.weight, *(layer.weight for layer in layers)]
    dtypes = {tensor.dtype for tensor in (x, *weights)}
    return is_eager_on_cpu(x, *weights) and dtypes <= set(DTYPES) and all(weight.requires_grad for weight in weights)


class NormedMLP(torch.autograd.Function):
    """x (..., D), the norm's weight (D,), down (D, I), one or two projections (I, D) -> (..., D).

    `activation` is a class of recomputed_activations_bm, whose inputs are the projections' outputs.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, eps: float, activation, *weights) -> torch.Tensor:
        dtype, rows = product_dtype(x), x.flatten(0, -2)
        scale = scale_of(rows, eps)
        inputs = normed(rows, norm_weight, scale, dtype)
        down, *projections = weights
        hidden = [product(inputs, weight.to(dtype).T) for weight in projections]
        ctx.save_for_backward(rows, norm_weight, scale, *weights, *hidden)
        ctx.activation, ctx.shape = activation, x.shape
        return product(activation.forward(*hidden), down.to(dtype).T).view(x.shape)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, of_output):
        rows, norm_weight, scale, down, *others = ctx.saved_tensors
        projections, hidden = others[: len(others) // 2], others[len(others) // 2 :]
        of_output, dtype = of_output.flatten(0, -2), hidden[0].dtype
        activated, *of_hidden = ctx.activation.recompute(*hidden, product(of_output, down.to(dtype)))
        of_weights = [product(of_output.T, activated)]
        del activated
        inputs = normed(rows, norm_weight, scale, dtype)
        of_weights += [product(gradient.T, inputs) for gradient in of_hidden]
        of_inputs = product(of_hidden[0], projections[0].to(dtype))
        for gradient, weight in zip(of_hidden[1:], projections[1:], strict=True):
            add_product(of_inputs, gradient, weight.to(dtype))
        of_x, of_norm = gradients_of_norm(rows, norm_weight, scale, of_inputs)
        return of_x.view(ctx.shape), of_norm, None, None, *(gradient.to(down.dtype) for gradient in of_weights)


__all__ = ["NormedMLP", "fits_normed_mlp"]
