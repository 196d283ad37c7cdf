"""Linear recurrences over positions, as MinGRU computes its states.  B rows, L positions, U units."""

from collections.abc import Iterable, Iterator
from itertools import islice
from math import isqrt

import torch
from torch.nn import functional as F

from .eager_cpu_bm import numbers_at_once, once_differentiable

FEW = 2**12  # numbers of a position: computing these takes less time than calling the operation
BLOCK = 16  # positions of a block of the scan, which are computed sequentially


class GatedScan(torch.autograd.Function):
    """All states (B, L, U) of a MinGRU of values and gates (B, L, 2 U) from `start` (B, U), or 0, on a CPU.

    In place and, but for the scan itself, in groups of rows that fit the cache: fewer passes over memory than `scan`,
    and over what surrounds it.  States are in float32 or, if that is more, in the dtype of values and gates.
    """

    @staticmethod
    def forward(ctx, values_and_gates: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        rows, length, width = values_and_gates.shape
        dtype = torch.promote_types(values_and_gates.dtype, torch.float32)
        takes, keeps, candidates, h = (torch.empty(rows, length, width // 2, dtype=dtype) for _ in range(4))
        for group, z, kept, g, new in by_rows(values_and_gates, takes, keeps, candidates, h):
            values, gates = group.to(dtype).chunk(2, dim=-1)
            torch.sigmoid(gates, out=z)
            torch.neg(gates, out=kept).sigmoid_()  # 1 - z, exact also where z is close to 1
            torch.add(values, 0.5, out=new)
            torch.maximum(new, torch.sigmoid(values, out=g), out=g)  # the larger one is the one of its side
            torch.mul(z, g, out=new)
        if start is not None:
            h[:, 0].addcmul_(keeps[:, 0], start)
        recur(h[:, 1:], keeps[:, 1:], h[:, 0])
        ctx.dtype = values_and_gates.dtype
        ctx.save_for_backward(takes, keeps, candidates, h, start)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, of_h: torch.Tensor):
        takes, keeps, candidates, h, start = ctx.saved_tensors
        of_new = of_h.clone(memory_format=torch.contiguous_format)  # z g, as h without what is kept
        recur(of_new[:, :-1], keeps[:, 1:], of_new[:, -1], order=-1)
        of_start = of_new[:, 0] * keeps[:, 0] if ctx.needs_input_grad[1] else None
        found = torch.empty(*h.shape[:2], 2 * h.shape[2], dtype=ctx.dtype)
        largest_below = 0.5 - torch.finfo(h.dtype).eps / 4  # the largest number below 1/2
        for of_both, of_g, z, kept, g, states in by_rows(found, of_new, takes, keeps, candidates, h):
            of_values, of_gates = of_both.chunk(2, dim=-1)
            of_g.mul_(z)
            of_kept = g.clone()
            of_kept[:, 1:].sub_(states[:, :-1])
            of_gates.copy_(of_kept.mul_(kept).mul_(of_g))
            # 1 from 1/2 on, where g is v + 1/2, and g (1 - g) below; torch.where takes four times as long.
            below, is_above = g.clamp(max=0.5), (g - largest_below).sign_().clamp_(min=0)
            of_values.copy_(below.addcmul_(below, below, value=-1).add_(is_above, alpha=0.75).mul_(of_g))
        if start is not None:
            found[:, 0, h.shape[2] :] = (candidates[:, 0] - start) * keeps[:, 0] * of_new[:, 0]
        return found, of_start


def by_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors (B, L, ...) in groups of as many rows as fit the cache, at least one."""
    numbers = max(tensor[:1].numel() for tensor in tensors)
    return zip(*(tensor.split(max(1, numbers_at_once() // max(1, numbers))) for tensor in tensors), strict=True)


def recur(h: torch.Tensor, a: torch.Tensor, before: torch.Tensor, order: int = 1) -> None:
    """h_t += a_t h_{t-1} in place for all t of (B, L, U); `before` (B, U) the first.  Backwards if `order` is -1.

    Where positions are small, in blocks of about sqrt(L / 3) side by side: the ends of the blocks without what comes
    before them, then the states at these ends, then all states.
    """
    length = h.shape[1]
    size = isqrt(length // 3)  # with which the operations, 3 `size` + L / `size`, are fewest
    if size < 3 or before.numel() > FEW:
        step_by_step(h.unbind(1)[::order], a.unbind(1)[::order], before)
        return
    whole = length - length % size
    in_blocks, others = (slice(whole), slice(whole, None)) if order == 1 else (slice(-whole, None), slice(-whole))
    blocks = [x[:, in_blocks].unflatten(1, (-1, size)).unbind(2)[::order] for x in (h, a)]  # each (B, blocks, U)
    ends, decays = blocks[0][0].clone(), blocks[1][0].clone()
    for new, factor in islice(zip(*blocks, strict=True), 1, None):
        torch.addcmul(new, factor, ends, out=ends)
        decays.mul_(factor)
    last = step_by_step(ends.unbind(1)[::order], decays.unbind(1)[::order], before)
    starts = (before[:, None], ends[:, :-1]) if order == 1 else (ends[:, 1:], before[:, None])
    step_by_step(*blocks, torch.cat(starts, dim=1))
    step_by_step(h[:, others].unbind(1)[::order], a[:, others].unbind(1)[::order], last)


def step_by_step(
    states: Iterable[torch.Tensor], factors: Iterable[torch.Tensor], before: torch.Tensor
) -> torch.Tensor:
    """Add to each of the states, in place, its factor times the state before; returns the last."""
    for state, factor in zip(states, factors, strict=True):
        before = state.addcmul_(factor, before)
    return before


class LinearScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t from h_0 = 0 along dimension 1 of (B, L, U), with 0 <= a <= 1.

    The gradient is the same recurrence backwards.  The paper scans logarithms instead (its appendix B).  Here
    not: in float32 the error of logarithms is 7e-4 at 4,096 positions (of this scan below 1e-6), a = 0 at the
    start of a document has no logarithm, and exponentials take 30 times as long on a CPU.
    """

    generate_vmap_rule = True  # for gradients of single rows by torch.func

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return scan(a, b)

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        a, h = ctx.saved_tensors
        following = F.pad(a[:, 1:], (0, 0, 0, 1))  # a_{t+1}
        grad_b = LinearScan.apply(following.flip(1), grad.flip(1)).flip(1)
        return grad_b * F.pad(h[:, :-1], (0, 0, 1, 0)), grad_b


def scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """All h_t = a_t h_{t-1} + b_t of (B, L, U), in blocks: work O(L), BLOCK * log_BLOCK(L) sequential steps.

    Within a block the state starts at 0; the states carried over from earlier blocks are the same recurrence over the
    ends of the blocks.
    """
    length = a.shape[1]
    size = min(BLOCK, length)
    padding = (0, 0, 0, -length % size)
    a, b = (F.pad(t, padding).unflatten(1, (-1, size)) for t in (a, b))  # (B, blocks, size, U)
    states, decays = [b[:, :, 0]], [a[:, :, 0]]
    for t in range(1, size):
        states.append(torch.addcmul(b[:, :, t], a[:, :, t], states[-1]))
        decays.append(a[:, :, t] * decays[-1])
    h = torch.stack(states, dim=2)
    if h.shape[1] > 1:
        carried = F.pad(scan(decays[-1], states[-1])[:, :-1], (0, 0, 1, 0))  # (B, blocks, U)
        h = torch.addcmul(h, torch.stack(decays, dim=2), carried[:, :, None])
    return h.flatten(1, 2)[:, :length]


__all__ = ["GatedScan", "LinearScan", "scan"]
