"""Which learning rate?  A short run whose rate grows from far too small to far too large, and its picture.

Source: Smith 2017, "Cyclical learning rates for training neural networks", arXiv:1506.01186, section 3.3.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from bmtk.errors import UserError

from .arguments import LoopArguments
from .prepared import Prepared, prepare
from .progress import Bar
from .protocols import TrainBatches, TrainingObjective
from .tbptt import tbptt_state
from .updates import Losses, Updater

LOWEST, HIGHEST = 1e-3, 1e3  # times the configured learning rate
NUM_STEPS = 120
HOPELESS = 3.0  # the test ends where the loss is this many times the lowest one
SMOOTHING = 0.9  # of an exponential moving average over the steps
SAFETY = 10.0  # the rate at which the loss was lowest, divided by this, is suggested


@dataclass(frozen=True)
class RangeTest:
    """Rates and smoothed losses of the steps, and the rate that they suggest."""

    rates: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """A tenth of the rate at which the loss was lowest, with one significant digit."""
        rate = self.rates[int(np.argmin(self.losses))] / SAFETY
        return float(f"{rate:.0e}")

    def draw(self, path: Path) -> None:
        """Write a picture of loss over rate."""
        from matplotlib.figure import Figure  # a third of a second to import

        figure = Figure(figsize=(7, 4))
        axes = figure.add_subplot()
        axes.plot(self.rates, self.losses)
        axes.axvline(self.suggestion, color="tab:green", linestyle="--", label=f"suggestion {self.suggestion:g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight")


def suggest_rate(objective: TrainingObjective, model: Any, args: LoopArguments, accelerator: Accelerator) -> str:
    """Run the test on the training rows; return its result in words, and draw it into `args.output_dir`."""
    prepared = prepare(model, args, accelerator)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = objective.train_batches(**args.batching, **ranks)
    found = range_test(prepared, batches, Losses.of(objective))
    picture = Path(args.output_dir) / "learning_rate.svg"
    if accelerator.is_main_process:
        found.draw(picture)
    lowest = int(np.argmin(found.losses))
    return (
        f"rates from {found.rates[0]:.1e} to {found.rates[-1]:.1e} in {len(found.rates)} steps; the loss fell from "
        f"{found.losses[0]:.4g} to {found.losses[lowest]:.4g} at {found.rates[lowest]:.1e}\n"
        f"suggestion: --learning_rate {found.suggestion:g}  (picture: {picture})"
    )


def range_test(prepared: Prepared, batches: TrainBatches, losses: Losses) -> RangeTest:
    """Train a model (which is spoilt by it) for a while at growing rates.

    All groups of the optimizer grow together, in the proportions of the configuration; the rates are the first's.
    Raises: UserError if no step gave a finite loss.
    """
    optimizer, accelerator = prepared.optimizer, prepared.accelerator
    updater = Updater(prepared, losses, max_grad_norm=0.0, recurrent=tbptt_state(batches))
    factors = np.geomspace(LOWEST, HIGHEST, NUM_STEPS)
    rates: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    prepared.model.train()
    hidden = not accelerator.is_main_process
    for step, factor in enumerate(Bar(factors, desc="learning-rate range test", leave=False, disable=hidden)):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * float(factor)
        update = updater.step(batches[step])
        loss = float(accelerator.reduce(update.loss) if accelerator.num_processes > 1 else update.loss)
        if not math.isfinite(loss) or bool(update.rejected):
            break
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING ** (step + 1)))
        rates.append(optimizer.param_groups[0]["lr"])
        if smoothed[-1] > HOPELESS * min(smoothed):
            break
    if not rates:
        raise UserError("the first step of the range test has no finite loss; look at the data, or lower the rate")
    return RangeTest(rates, smoothed)
