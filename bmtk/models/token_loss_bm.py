"""Loss of an output layer over many classes without its logits.  N positions, D width, V tokens.

Logits of a batch are the largest tensors of a language model: in float32, with their log-softmax and the gradients of
both, they take 16 V bytes a position.  On a CPU they are computed, scored and turned into gradients some rows at a
time, while these are in the cache; the gradients wait for the backward pass, as in cut cross-entropy (Wijmans et al.
2024, arXiv:2411.09009) and liger-kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from .eager_cpu_bm import is_eager_on_cpu, is_plain_linear, once_differentiable
from .products_bm import (
    LOG2_E,
    add_product,
    casts_before_products,
    float32_product,
    float32_products_of_bfloat16,
    product,
    product_dtype,
)

IGNORED = -100  # label of a position that is not predicted
CHUNK = 2**22  # logits at a time: 16 MB in float32


def label_loss(logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    """Cross-entropy of logits (..., K) and labels (...), which are -100 where nothing is predicted."""
    # In float32: a sum over many tokens would lose most of its digits in bfloat16.
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
    return total / ((labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def token_loss(hidden: torch.Tensor, labels: torch.Tensor, layer: nn.Module, num_items_in_batch=None) -> torch.Tensor:
    """`label_loss(layer(hidden), labels, ...)` of hidden (..., D) and labels (...), without keeping the logits.

    On a CPU, positions without a label are left out.
    """
    if not is_eager_on_cpu(hidden, labels):  # a GPU's host would wait for the labels; graphs have shapes without data
        return label_loss(layer(hidden), labels, num_items_in_batch)
    is_scored = labels != IGNORED
    are_all_scored = bool(is_scored.all())
    if are_all_scored:
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
    else:
        hidden, labels = hidden[is_scored], labels[is_scored]
    if not can_score_in_chunks(hidden, layer):
        return label_loss(layer(hidden), labels, num_items_in_batch)
    count = max(1, len(labels)) if num_items_in_batch is None else num_items_in_batch
    with_gradients = torch.is_grad_enabled()
    return ChunkedLoss.apply(
        hidden, layer.weight, layer.bias, labels, float(count), with_gradients, not are_all_scored
    )


@torch.no_grad()
def token_losses(hidden: torch.Tensor, labels: torch.Tensor, layer: nn.Module, num_tokens: int) -> torch.Tensor:
    """Cross-entropies (...) of `layer(hidden)`, V = `num_tokens`, and labels (...); 0 where there is no label."""
    rows, targets = hidden.flatten(0, -2), labels.flatten()
    sizes = rows_at_once(num_tokens, hidden.shape[-1])
    pairs = zip(rows.split(sizes), targets.split(sizes), strict=True)
    losses = [F.cross_entropy(layer(x).float(), y, reduction="none", ignore_index=IGNORED) for x, y in pairs]
    return torch.cat(losses).view(labels.shape)


def can_score_in_chunks(hidden: torch.Tensor, layer: nn.Module) -> bool:
    """Whether ChunkedLoss computes what `layer` and the cross-entropy do."""
    if not (is_plain_linear(layer) and is_eager_on_cpu(hidden, layer.weight)):
        return False
    dtypes = {product_dtype(hidden), product_dtype(layer.weight)}
    return dtypes < {torch.float32, torch.bfloat16}  # one of them: float16 would lose gradients that are not scaled


class ChunkedLoss(torch.autograd.Function):
    """hidden (N, D), weight (V, D), bias (V,) or None, labels (N,) -> the cross-entropies' sum over `count`.

    The gradients are computed with the loss, as if its own gradient were 1, and multiplied by it later.  `varies`: N
    differs from step to step.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, count: float, with_gradients: bool, varies: bool) -> torch.Tensor:
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        dtype, products = product_dtype(hidden), nullcontext
        if dtype == torch.bfloat16 and not casts_before_products():
            dtype, products = torch.float32, float32_products_of_bfloat16
        with products():
            loss, gradients = loss_and_gradients(hidden, weight, bias, labels, count, wanted, dtype, varies)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, of_loss):
        gradients = ctx.saved_tensors
        if of_loss != 1:
            gradients = [None if gradient is None else gradient * of_loss for gradient in gradients]
        cast = (None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *cast, None, None, None, None


@torch.autocast("cpu", enabled=False)
def loss_and_gradients(hidden, weight, bias, labels, count: float, wanted: list[bool], dtype, varies: bool):
    """The loss of ChunkedLoss, and the gradients of hidden, weight and bias that are `wanted`, else None.

    Matrices are multiplied in `dtype`, which the products have at first; all else is float32.
    """
    matrix, vector = weight.to(dtype), None if bias is None else bias.float()
    of_hidden = torch.empty_like(hidden) if wanted[0] else None
    # In float32, because a sum of chunks that are rounded to 16 bits loses digits with each of them.
    of_weight, of_bias = (
        torch.zeros_like(x, dtype=torch.float32) if want else None
        for x, want in zip((weight, bias), wanted[1:], strict=True)
    )
    total = hidden.new_zeros((), dtype=torch.float32)
    buffer = hidden.new_empty((rows_at_once(*weight.shape), len(weight)), dtype=torch.float32)
    for start in range(0, len(hidden), len(buffer)):
        rows = slice(start, start + len(buffer))
        inputs, targets = hidden[rows].to(dtype), labels[rows, None]
        is_rare = varies and len(inputs) < len(buffer)
        scores = float32_product(inputs, matrix.T, buffer[: len(inputs)], is_rare=is_rare)
        if vector is not None:
            scores.add_(vector)
        total += replace_by_probabilities(scores, targets)
        if not any(wanted):
            continue
        scores.scatter_add_(1, targets, scores.new_full(targets.shape, -1.0))
        if of_bias is not None:
            of_bias.add_(scores.sum(0), alpha=1 / count)
        of_scores = scores.to(dtype)  # probabilities, less 1 at the target: the gradient of their sum
        if of_hidden is not None:
            of_hidden[rows] = product(of_scores, matrix, is_rare=is_rare)
        if of_weight is not None:
            add_product(of_weight, of_scores.T, inputs, 1 / count, is_rare=is_rare)
    return total / count, (None if of_hidden is None else of_hidden.div_(count), of_weight, of_bias)


def replace_by_probabilities(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of the cross-entropies of scores (n, V) and targets (n, 1); scores become their softmax, in place.

    By powers of 2, as in attention: MKL's exp takes four times as long on an AMD processor.
    """
    of_targets = scores.gather(1, targets)
    largest = scores.amax(-1, keepdim=True).mul_(LOG2_E)
    torch.add(-largest, scores, alpha=LOG2_E, out=scores).exp2_()
    sums = scores.sum(-1, keepdim=True)
    scores.mul_(1 / sums)
    return (sums.log2_().add_(largest).div_(LOG2_E) - of_targets).sum()


def rows_at_once(num_tokens: int, width: int) -> int:
    """Rows of a chunk: as many as fill the cache, or the width, below which adding up the gradients takes longest."""
    return max(width, CHUNK // num_tokens)


__all__ = ["label_loss", "token_loss", "token_losses"]
