"""Attention in training on a CPU.  B rows, H query and G key heads, L positions, d head size.

torch's own backward of fused attention takes nine times as long as its forward there (torch 2.13, bfloat16).
This one multiplies the whole heads of several rows at a time: two to three times as fast for rows of up to 128
positions, a fifth faster at 256.
"""

from collections.abc import Iterator

import torch

from .eager_cpu_bm import is_eager_on_cpu
from .products_bm import float32_products_of_bfloat16

BLOCK = 2**20  # scores at a time: 4 MB in float32, which fits into the caches of two cores
LONGEST = 256  # positions; torch is as fast beyond, as it leaves out what lies in the future
LEAST_EXPONENT = -50.0  # its exponential, 2e-22, is nothing beside a sum of 1


def fits_cpu_attention(query, key, value, attention_mask, dropout: float) -> bool:
    """Whether CPUAttention computes this attention: in training, over whole rows, without mask and dropout."""
    if attention_mask is not None or dropout or not torch.is_grad_enabled():
        return False
    tensors = (query, key, value)
    if not (is_eager_on_cpu(*tensors) and any(x.requires_grad for x in tensors)):
        return False
    is_bfloat16 = all(x.dtype == torch.bfloat16 for x in tensors)
    return is_bfloat16 and query.shape[2] == key.shape[2] <= LONGEST


class CPUAttention(torch.autograd.Function):
    """query (B, H, L, d), key, value (B, G, L, d) -> (B, H, L, d)."""

    @staticmethod
    def forward(ctx, query, key, value, is_causal: bool, scaling: float) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        of_queries = (repeated(x, groups, dim=1) for x in (key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, log_sums = flash(query, *of_queries, 0.0, is_causal, scale=scaling)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.is_causal, ctx.scaling, ctx.groups = is_causal, scaling, groups
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_output):
        query, key, value, output, log_sums = ctx.saved_tensors
        found = tuple(torch.empty_like(x) for x in (query, key, value))  # in memory like them: (B, L, H, d)
        with float32_products_of_bfloat16():
            for rows, heads in blocks(*key.shape[:3], ctx.groups):
                of_key_heads = slice(heads.start * ctx.groups, heads.stop * ctx.groups)
                of_queries = [x[rows, of_key_heads] for x in (query, output, of_output, log_sums)]
                computed = gradients_of_heads(
                    *of_queries, key[rows, heads], value[rows, heads], ctx.is_causal, ctx.scaling
                )
                for whole, part, where in zip(found, computed, (of_key_heads, heads, heads), strict=True):
                    whole[rows, where] = part
        return *found, None, None


def blocks(num_rows: int, num_heads: int, length: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """Rows and key heads whose scores are computed together: several rows, or some heads of one."""
    fit = max(1, BLOCK // (length**2 * groups))  # key heads
    rows, heads = max(1, fit // num_heads), min(fit, num_heads)
    for row in range(0, num_rows, rows):
        for head in range(0, num_heads, heads):
            yield slice(row, row + rows), slice(head, min(head + heads, num_heads))


def gradients_of_heads(query, output, of_output, log_sums, key, value, is_causal: bool, scaling: float):
    """Gradients of query (B, H, L, d), key and value (B, G, L, d): Dao et al. 2022, arXiv:2205.14135, algorithm 4."""
    rows, groups = len(key), query.shape[1] // key.shape[1]
    # In float32, in which products of bfloat16 are exact: rounded scores would be off by percents where exp is steep.
    query, output, of_output = (float32_heads(x) for x in (query, output, of_output))
    key, value = (repeated(float32_heads(x), groups, dim=0) for x in (key, value))
    weights = torch.bmm(query, key.mT).mul_(scaling).sub_(log_sums.flatten(0, 1)[..., None])
    # Scores of later positions may be any number, and the exponential of large ones takes 30 times as long.
    weights.clamp_(LEAST_EXPONENT, 0.0).exp_()
    if is_causal:
        weights.tril_()
    of_scores = torch.bmm(of_output, value.mT).sub_(output.mul_(of_output).sum(-1, keepdim=True)).mul_(weights)
    of_query = torch.bmm(of_scores, key).mul_(scaling)
    of_key = torch.bmm(query.mT, of_scores).mul_(scaling).mT  # (q^T s)^T, because s^T q would turn the large matrix
    of_value = torch.bmm(of_output.mT, weights).mT
    return of_query.unflatten(0, (rows, -1)), *(summed_over_groups(x, rows, groups) for x in (of_key, of_value))


def repeated(x: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    """Key heads, each as often as there are query heads that read it."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=dim)


def summed_over_groups(x: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """(B H, L, d) -> (B, G, L, d)."""
    return x.unflatten(0, (rows, -1)) if groups == 1 else x.unflatten(0, (rows, -1, groups)).sum(2)


def float32_heads(x: torch.Tensor) -> torch.Tensor:
    """(B, H, L, d) -> (B H, L, d), float32."""
    return x.transpose(1, 2).float().transpose(1, 2).reshape(-1, *x.shape[2:])  # a cast while copying is slow


__all__ = ["CPUAttention", "fits_cpu_attention"]
