"""The state of a recurrent network between two optimizer steps: truncated backpropagation through time."""

from typing import Any

import torch

from bmtk.errors import UserError

from .protocols import TrainBatches


class TBPTTState:
    """The state after each row of this process's last optimizer step: `rows` (rows, W), None before the first one.

    A step reads it micro-batch by micro-batch, in the order of their rows, and at its end calls `turn()`.  No
    gradient flows from a step into the one before it.
    """

    def __init__(self, rows: torch.Tensor | None = None):
        self.rows = rows
        self.after: list[torch.Tensor] = []

    def inputs(self, num_rows: int) -> dict[str, Any]:
        """Arguments of the model's forward for the step's next `num_rows` rows."""
        if self.rows is None:
            return {"output_state": True}
        first = sum(len(state) for state in self.after)
        return {"output_state": True, "initial_state": self.rows[first : first + num_rows]}

    def add(self, state: torch.Tensor) -> None:
        """Keep the state (rows, W) after the rows of the last `inputs`."""
        self.after.append(state.detach())

    def turn(self, *, unless: torch.Tensor | None = None) -> None:
        """End the step; `unless` (0-dim bool) it was not applied: the rows then go on from the state before it.

        What is not finite all the same starts anew from 0.
        """
        after, self.after = torch.cat(self.after).nan_to_num(0.0, 0.0, 0.0), []
        if unless is not None:
            after = torch.where(unless, torch.zeros_like(after) if self.rows is None else self.rows, after)
        self.rows = after


def tbptt_state(batches: TrainBatches, before: TBPTTState | None = None) -> TBPTTState | None:
    """The state that steps over `batches` carry: `before`, or a new one; None if every row starts anew."""
    return (before or TBPTTState()) if batches.carries_state else None


def check_carries(model: torch.nn.Module) -> None:
    """Raises: UserError if `model` has no state that it could go on from."""
    if not getattr(model, "carries_state", False):
        raise UserError(
            f"carry_state=True carries the state of a causal bm_rnn from row to row, and {type(model).__name__} has "
            "none; leave it out, or set model_type to bm_rnn"
        )
