"""The state of a recurrent network between two optimizer steps: truncated backpropagation through time."""

import torch


class TBPTTState:
    """The state after each row of this process's last optimizer step: `rows` (rows, W), None before the first one.

    A step asks for it micro-batch by micro-batch, in the order of their rows, and at its end calls `turn()`.  No
    gradient flows from a step into the one before it.
    """

    def __init__(self, rows: torch.Tensor | None = None):
        self.rows = rows
        self.after: list[torch.Tensor] = []

    def inputs(self, num_rows: int) -> dict[str, torch.Tensor | bool]:
        """What a model is called with for the step's next `num_rows` rows."""
        asked = {"output_state": True}
        if self.rows is None:
            return asked
        first = sum(len(state) for state in self.after)
        return asked | {"initial_state": self.rows[first : first + num_rows]}

    def add(self, state: torch.Tensor) -> None:
        """Note the state (rows, W) after the rows that were asked for last."""
        self.after.append(state.detach())

    def turn(self) -> None:
        """End the step.  What is not finite starts anew from 0: its update was not applied either."""
        self.rows, self.after = torch.cat(self.after).nan_to_num(0.0, 0.0, 0.0), []


def tbptt_state(batches, before: TBPTTState | None = None) -> TBPTTState | None:
    """What steps over `batches` carry: the state `before` them, a new one, or None if their rows do not go on."""
    return (before or TBPTTState()) if batches.carries_state else None


def check_carries(model: torch.nn.Module) -> None:
    """Raises: ValueError if `model` has no state that it could go on from."""
    if not getattr(model, "carries_state", False):
        raise ValueError(
            f"carry_state=True carries the state of a causal bm_rnn from row to row, and {type(model).__name__} has "
            "none; leave it out, or set model_type to bm_rnn"
        )
