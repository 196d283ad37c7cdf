"""The account of steps that were not applied: a line and a bundle of each, and how many came in a row.

    <output_dir>/bad_steps/step-00000012-data-00000012/
        event.json                what it was: loss, gradient norm, and their levels over the steps before
        process-0.safetensors     of each process: its rows of the step, its generators before it, the window

`step` is the number of the optimizer step, counted from 1; `data` the number of its rows in the order of the data,
which is larger where steps of data were left out.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from bmtk.files import replacing, write_json

from .arguments import SharedArguments
from .guards import GuardState, is_sound
from .protocols import KnowsRows
from .rollback import data_step
from .spikes import levels
from .updates import Before

logger = logging.getLogger(__name__)

FOLDER = "bad_steps"
AFTER_CHANGES = "(with overwrite_output_dir, if settings changed and checkpoints are there)"


class BadSteps:
    """Notes the steps of one run that were not applied, on every process."""

    def __init__(self, directory: str | Path, args: SharedArguments, accelerator: Accelerator, state: GuardState):
        self.folder, self.args, self.accelerator, self.state = Path(directory) / FOLDER, args, accelerator, state
        self.batches: object = None  # are asked which rows a step has, if they know it

    def note(self, step: int, loss: float, norm: float, before: Before) -> str:
        """Write the bundle of step `step`, and say what it was."""
        data = data_step(step - 1, self.state.left_out) + 1
        event = {"step": step, "data": data, "loss": loss, "grad_norm": norm, **_levels(before)}
        is_spike = is_sound(loss) and math.isfinite(norm)
        what = event["what"] = "spike" if is_spike else "not finite"
        folder = self.folder / f"step-{step:08d}-data-{data:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            write_json(folder / "event.json", {key: _plain(value) for key, value in event.items()})
        with replacing(folder / f"process-{self.accelerator.process_index}.safetensors") as beside:
            save_file({**before.randomness, **self._rows(data - 1), **_window(before)}, beside)
        why = f"{what}; see {folder}"
        if is_spike:
            why = (
                f"{what}: both are {self.args.spike_sigma:g} robust deviations above the last steps, "
                f"{event['loss_median']:.4g} ± {event['loss_deviation']:.2g} and {event['grad_norm_median']:.4g} ± "
                f"{event['grad_norm_deviation']:.2g}; see {folder}"
            )
        return f"step {step}: loss {loss:.6g}, gradient norm {norm:.6g} ({why}); this update was not applied"

    def row_before(self, step: int) -> list[int]:
        """The last `rollback_after` steps up to `step`, if none of them was applied; else nothing."""
        row = list(range(step - self.args.rollback_after + 1, step + 1))
        return row if self.state.skipped[-len(row) :] == row else []

    def no_way_on(self, row: list[int]) -> str:
        """What happened, where the run cannot go back after the steps `row`."""
        former = self.state.failed_at
        again = "" if former < 0 else f", after going back from step {former + 1} did not help"
        return f"step {row[-1]}: these are {len(row)} such steps in a row, so skipping does not help{again}"

    def leave_out(self, row: list[int], *, to: int, state: GuardState) -> None:
        """Write down that the run goes back to step `to`, and into `state` that the data of `row` are left out."""
        data = self.data_of(row)
        self._note_return(row, [step + 1 for step in data], to=to)
        state.left_out = sorted({*state.left_out, *data})
        state.failed_at = row[0] - 1

    def _note_return(self, row: list[int], data: list[int], *, to: int) -> None:
        if not self.accelerator.is_main_process:
            return
        logger.warning(
            "steps %d to %d were not applied: going back to the checkpoint after step %d; the rows of steps %d to %d "
            "are left out from now on",
            *(row[0], row[-1], to, data[0], data[-1]),
        )
        path = self.folder / f"rollback-{row[0]:08d}-data-{data[0]:08d}.json"
        write_json(path, {"what": "rollback", "steps": row, "back_to": to, "left_out": data})

    def data_of(self, row: list[int]) -> list[int]:
        """The steps in the order of the data, counted from 0, that the steps `row` had their rows from."""
        return [data_step(step - 1, self.state.left_out) for step in row]

    def _rows(self, data: int) -> dict[str, torch.Tensor]:
        if not isinstance(self.batches, KnowsRows):
            return {}
        rows, epochs = self.batches.places(data)
        return {"rows": torch.as_tensor(rows), "epochs": torch.as_tensor(epochs)}


def _window(before: Before) -> dict[str, torch.Tensor]:
    return {} if before.window is None else {"window": before.window.cpu()}


def _levels(before: Before) -> dict[str, Any]:
    if before.window is None:
        return {}
    middle, deviation = (values.tolist() for values in levels(before.window.cpu()))
    names = ("loss_median", "grad_norm_median", "loss_deviation", "grad_norm_deviation")
    return dict(zip(names, [*middle, *deviation], strict=True))


def _plain(value: Any) -> Any:
    """A number that JSON does not know as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
