"""Pooling: from all positions of a row to one vector.  B rows, L positions, D width.

A mask (B, L) holds 1 for real positions and 0 for padding, on either side; without one, every position is real.
"""

import torch


def first_position(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) -> (B, D): the first real position of each row."""
    if mask is None:
        return hidden_states[:, 0]
    first = mask.long().argmax(-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), first]


def last_position(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) -> (B, D): the last real position of each row."""
    if mask is None:
        return hidden_states[:, -1]
    steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    last = (steps * mask).argmax(-1)
    return hidden_states[torch.arange(hidden_states.shape[0], device=hidden_states.device), last]


def mean_position(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) -> (B, D): the mean over the real positions of each row."""
    if mask is None:
        return hidden_states.mean(1)
    is_real = mask[..., None].bool()
    return hidden_states.where(is_real, 0).sum(1) / is_real.sum(1).clamp(min=1)


def max_position(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, L, D) -> (B, D): the largest value of each column over the real positions of each row."""
    if mask is not None:
        hidden_states = hidden_states.masked_fill(mask[..., None] == 0, torch.finfo(hidden_states.dtype).min)
    return hidden_states.amax(1)


POOLINGS = {"first": first_position, "last": last_position, "mean": mean_position, "max": max_position}


def mask_of_positions(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask (B, L) of the last `length` positions; None for masks of another kind than (B, past + L)."""
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:]


__all__ = ["POOLINGS", "first_position", "last_position", "mask_of_positions", "max_position", "mean_position"]
