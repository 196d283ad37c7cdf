"""Attention in training on a CPU.  B rows, H query and G key heads, L positions, d head size; N heads of a block.

torch's backward of fused attention takes twice as long for 256 positions of bfloat16 as these products of whole heads,
and more for fewer; so does its forward where the processor has instructions for bfloat16, but no AMX (torch 2.13).
Weights are computed again in the backward pass, as in Dao et al. 2022, arXiv:2205.14135.  Exponentials are powers of
2, because the exp of MKL takes four times as long on an AMD processor.
"""

import math
from collections.abc import Iterator

import torch

from .eager_cpu_bm import is_eager_on_cpu, once_differentiable
from .products_bm import LOG2_E, casts_before_products, float32_products_of_bfloat16

BLOCK = 2**20  # scores at a time: 4 MB in float32, which fits into the caches of two cores
QUERIES = 128  # at a time in long rows: if attention is causal, keys in the future of all of them are left out
LONGEST, LONGEST_ELSEWHERE = 2048, 256  # positions; torch is as fast beyond; elsewhere: its forward attends
Block = tuple[slice, slice]  # rows, and heads of them


def fits_cpu_attention(query, key, value, attention_mask, dropout: float) -> bool:
    """Whether CPUAttention computes this attention: in training, over whole rows, without mask and dropout."""
    if attention_mask is not None or dropout or not torch.is_grad_enabled():
        return False
    tensors = (query, key, value)
    if not (is_eager_on_cpu(*tensors) and any(x.requires_grad for x in tensors)):
        return False
    is_bfloat16 = all(x.dtype == torch.bfloat16 for x in tensors)
    longest = LONGEST if casts_before_products() else LONGEST_ELSEWHERE
    return is_bfloat16 and 0 < query.shape[2] == key.shape[2] <= longest


class CPUAttention(torch.autograd.Function):
    """query (B, H, L, d), key, value (B, G, L, d) -> (B, H, L, d)."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # which would round scores
    def forward(ctx, query, key, value, is_causal: bool, scaling: float) -> torch.Tensor:
        attend = attended if casts_before_products() else attended_by_torch
        output, log_sums = attend(query, key, value, is_causal, scaling)
        ctx.save_for_backward(query, key, value, log_sums)
        ctx.is_causal, ctx.scaling = is_causal, scaling
        return output

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, of_output):
        query, key, value, log_sums = ctx.saved_tensors
        found = tuple(torch.empty_like(x) for x in (query, key, value))  # in memory like them: (B, L, H, d)
        future = future_of(query) if ctx.is_causal else None
        with float32_products_of_bfloat16():
            for of_queries, of_keys in blocks(query, key):
                inputs = [x[of_queries] for x in (query, of_output, log_sums)]
                gradients = gradients_of_heads(*inputs, key[of_keys], value[of_keys], future, ctx.scaling)
                for whole, part, where in zip(found, gradients, (of_queries, of_keys, of_keys), strict=True):
                    whole[where] = part.to(whole.dtype)  # first, because a cast while copying is slow
        return *found, None, None


def attended_by_torch(query, key, value, is_causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attended`."""
    groups = query.shape[1] // key.shape[1]
    inputs = (query, repeated(key, groups), repeated(value, groups))
    # The kernel reads the numbers of a head as if they were side by side.
    inputs = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, log_sums = flash(*inputs, 0.0, is_causal, scale=scaling)
    return output, log_sums * LOG2_E


def attended(query, key, value, is_causal: bool, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention (B, H, L, d), and log2 of the sums (B, H, L) of exponentials that scores are normalized by."""
    output, log_sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    future = future_of(query) if is_causal else None
    with float32_products_of_bfloat16():
        for of_queries, of_keys in blocks(query, key):
            found = attended_by_heads(query[of_queries], key[of_keys], value[of_keys], future, scaling)
            output[of_queries], log_sums[of_queries] = found
    return output, log_sums


def attended_by_heads(query, key, value, future, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of query (b, h, L, d), key and value (b, g, L, d)."""
    output, log_sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    key, value = (heads_of(x, query.shape[1]) for x in (key, value))
    wide_key = key.float()
    for rows, seen in pieces(query.shape[2], future):
        wide_query = heads_of(query[:, :, rows]).float()
        scores = scores_of(wide_query, wide_key[:, seen], future, scaling)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp2_()
        sums = weights.sum(-1, keepdim=True)
        found = weights.mul_(1 / sums).to(value.dtype) @ value[:, seen]
        output[:, :, rows] = found.unflatten(0, query.shape[:2])
        log_sums[:, :, rows] = largest.add_(sums.log2_()).view(log_sums[:, :, rows].shape)
    return output, log_sums


def gradients_of_heads(query, of_output, log_sums, key, value, future, scaling: float):
    """Gradients of query (b, h, L, d), key and value (b, g, L, d)."""
    of_query, of_key, of_value, shape = torch.empty_like(query), [], [], key.shape
    key, value = (heads_of(x, query.shape[1]) for x in (key, value))
    wide_key, wide_value = key.float(), value.float()
    for rows, seen in pieces(query.shape[2], future):
        some_query, some_gradient = (heads_of(x[:, :, rows]) for x in (query, of_output))
        wide_query, wide_gradient = some_query.float(), some_gradient.float()
        weights = scores_of(wide_query, wide_key[:, seen], future, scaling)
        weights.sub_(log_sums[:, :, rows].reshape(*wide_query.shape[:2], 1)).exp2_()
        of_scores = scaled_product(wide_gradient, wide_value[:, seen], scaling).mul_(weights)
        # Summed here, because the mean by the output, which was rounded, is off where gradients nearly cancel it.
        of_scores.addcmul_(weights, of_scores.sum(-1, keepdim=True), value=-1)
        if casts_before_products():
            of_scores, weights = of_scores.to(query.dtype), weights.to(query.dtype)
        else:  # AMX rounds what it multiplies; without it these products are those of float32
            some_query, key, some_gradient = wide_query, wide_key, wide_gradient
        of_query[:, :, rows] = (of_scores @ key[:, seen]).to(query.dtype).unflatten(0, query.shape[:2])
        of_key.append(turned_product(of_scores, some_query))
        of_value.append(turned_product(weights, some_gradient))
    return of_query, summed(of_key, shape), summed(of_value, shape)


def blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[Block, Block]]:
    """Queries and keys of several rows, or of some heads of one, whose scores are computed together."""
    num_rows, num_heads, length, _ = key.shape
    groups = query.shape[1] // num_heads
    fit = max(1, BLOCK // (queries_at_once(length) * length * groups))  # key heads
    rows, heads = max(1, fit // num_heads), min(fit, num_heads)
    for row in range(0, num_rows, rows):
        for head in range(0, num_heads, heads):
            of_rows, last = slice(row, row + rows), min(head + heads, num_heads)
            yield (of_rows, slice(head * groups, last * groups)), (of_rows, slice(head, last))


def queries_at_once(length: int) -> int:
    return QUERIES if length >= 2 * QUERIES else length


def pieces(length: int, future: torch.Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys that they may see; the last queries, which see all keys, come first."""
    step = queries_at_once(length)
    for start in reversed(range(0, length, step)):
        stop = min(start + step, length)
        yield slice(start, stop), slice(0, length if future is None else stop)


def future_of(query: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of some queries and of the keys at their positions: -inf where a key is later."""
    size = queries_at_once(query.shape[2])
    return torch.full((size, size), -math.inf).triu_(1)


def scores_of(query, key, future, scaling: float) -> torch.Tensor:
    """Scores (N, l, s), of which the powers of 2 are what exponentials are of others.

    In float32, in which products of bfloat16 are exact: rounded scores would be off by percents where they are large.
    """
    scores = scaled_product(query, key, scaling * LOG2_E)
    if future is not None:
        size = query.shape[1]
        scores[..., -size:].add_(future[:size, :size])
    return scores


def scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """a (N, l, d), b (N, s, d) -> (N, l, s)."""
    b = b.contiguous()  # else torch makes a copy that is turned
    return torch.baddbmm(a.new_zeros(()), a, b.mT, beta=0, alpha=scaling)  # 0: of no summand


def turned_product(scores: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """scores (N, l, s), heads (N, l, d) -> (N, s, d)."""
    if scores.dtype == torch.bfloat16:
        return scores.mT @ heads
    return (heads.mT @ scores).mT  # the first would be turned in memory, and scores are the larger ones


def heads_of(x: torch.Tensor, num_heads: int | None = None) -> torch.Tensor:
    """(b, g, l, d) -> (b h, l, d), contiguous: key heads, each as often as there are query heads that read it."""
    return repeated(x, (num_heads or x.shape[1]) // x.shape[1]).flatten(0, 1).contiguous()


def repeated(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def summed(parts: list[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Gradients (b h, s, d) of the first s keys, of which the first has all -> those of key heads (b, g, L, d)."""
    total = parts[0].float()
    for part in parts[1:]:
        total[:, : part.shape[1]] += part
    return total.unflatten(0, (*shape[:2], -1)).sum(2) if len(total) > shape[:2].numel() else total.view(shape)


__all__ = ["CPUAttention", "fits_cpu_attention"]
