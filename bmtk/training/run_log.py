"""The account of a run while it goes: its state, history.jsonl, progress bar, evaluations and checkpoints."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from bmtk.errors import UserError

from .arguments import LoopArguments
from .checkpoint import TrainState
from .early_stopping import is_better, is_exhausted
from .evaluation import lower_is_better
from .guards import SpikeWatch
from .history import History
from .progress import Bar, evaluation_line
from .rng_state import preserved_rng_state, seed_process, set_rng_state
from .sharding import ProcessLayout
from .throughput import Meter
from .updates import Update

logger = logging.getLogger(__name__)

MAX_SKIPS_IN_A_ROW = 20  # after this many rejected steps the weights or the data are broken: skipping cannot help


@dataclass(frozen=True)
class Hooks:
    """What a run calls on its way; each may be None."""

    evaluate: Callable[[], dict[str, float]] | None = None  # metrics; called on every process
    main_metric: str = "validation/loss"  # the one of them used for early stopping
    save: Callable[[TrainState], object] | None = None  # writes a checkpoint; called on every process
    load_best: Callable[[TrainState], object] | None = None  # puts what was saved after state.best_step into the model
    log: Callable[[dict[str, float]], None] | None = None  # gets each line of history.jsonl; on the main process


class RunLog:
    """Account of one run.  Updates are read from the device only when something is due, so the host can run ahead."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: LoopArguments,
        state: TrainState,
        *,
        total: int,
        meter: Meter,
        hooks: Hooks = Hooks(),
    ):
        self.accelerator, self.args, self.state, self.total, self.meter = accelerator, args, state, total, meter
        self.hooks, self.layout = hooks, ProcessLayout.of(args, accelerator.num_processes)
        self.history = History(args.output_dir)
        self.unread: list[Update] = []
        self.window_tokens = 0  # since the meter's last lap
        self.grad_norm: float | None = None
        self.spikes = SpikeWatch()

    def begin(self) -> None:
        """Forget what came after the resumed step, set the generators, and start the clock."""
        if self.accelerator.is_main_process:
            self.history.cut(after=self.state.step)
        if self.state.rng_state is None:
            rank = self.layout.share(self.accelerator.process_index)["rank"]  # same rows, same dropout
            seed_process(self.args.seed, rank, self.state.step)
        else:
            set_rng_state(self.state.rng_state)
            self.state.rng_state = None
        self.meter.start(self.state.seconds)

    def bar(self) -> Bar:
        """Make the progress bar, which only the main process shows."""
        hidden = not self.accelerator.is_main_process
        return Bar(total=self.total, initial=self.state.step, unit="step", dynamic_ncols=True, disable=hidden)

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0, until the run ends."""
        while self.state.step < self.total and not self.is_over:
            yield self.state.step

    def add(self, update: Update) -> None:
        """Count one step; read it at once if it is known to be rejected, or something is due after it."""
        self.state.step += 1
        self.unread.append(update)
        cadences = (self.args.logging_steps, self.args.eval_steps, self.args.save_steps)
        if update.rejected is True or any(self.is_due(steps) for steps in cadences):
            self.read()

    def is_due(self, every: int) -> bool:
        """Whether the current step is the last one or a multiple of `every` (0: only the last one)."""
        return self.state.step == self.total or bool(every and self.state.step % every == 0)

    def read(self) -> None:
        """Read the updates of all processes from the device into the state.

        Raises: FloatingPointError for a rejected step that may not be skipped.
        """
        if not self.unread:
            return
        shares = torch.stack([update.loss for update in self.unread]).double()
        losses = self.layout.sum_over_shares(self.accelerator, shares).tolist()
        counts = torch.stack([update.num_items for update in self.unread]).tolist()
        units = torch.stack([update.num_units for update in self.unread]).tolist()
        norms = torch.stack([update.grad_norm for update in self.unread]).tolist()
        first = self.state.step - len(self.unread) + 1
        updates, self.unread = self.unread, []
        for step, (update, loss, count, unit_count, norm) in enumerate(
            zip(updates, losses, counts, units, norms, strict=True), start=first
        ):
            if bool(update.rejected):
                self._reject(step, loss, norm, update)
            else:
                self.state.window_loss += loss * count
                self.state.window_items += count
                self.grad_norm = norm
                self.spikes.see(step, loss)
            self.state.tokens += unit_count
            self.window_tokens += unit_count

    def _reject(self, step: int, loss: float, norm: float, update: Update) -> None:
        happened = f"step {step}: loss {loss}, gradient norm {norm}; this update was not applied"
        if self.args.nonfinite == "stop":
            self._go_back(step - 1, update)
            remedy = "lower learning_rate or max_grad_norm, look at the data of this step, or set nonfinite to 'skip'"
        else:
            self.state.skipped.append(step)
            last = self.state.skipped[-MAX_SKIPS_IN_A_ROW:]
            if last != list(range(step - MAX_SKIPS_IN_A_ROW + 1, step + 1)):
                logger.warning("%s", happened)
                return
            remedy = (
                f"these are {MAX_SKIPS_IN_A_ROW} such steps in a row, so skipping does not help: lower learning_rate"
            )
        raise FloatingPointError(
            f"{happened}, and {self._save_sound_weights()}: {remedy}, then run again (with overwrite_output_dir, if "
            "settings changed and checkpoints are there)"
        )

    def _go_back(self, step: int, update: Update) -> None:
        """Be where the run was after `step`: no later one was applied, since the run stops."""
        self.state.step = step
        if before := update.before:
            set_rng_state(before.randomness)
            if self.state.recurrent:
                self.state.recurrent.rows = before.carried

    def _save_sound_weights(self) -> str:
        """Save the weights before a step that ends the run, which might be the only ones; say where they are."""
        if not self.state.step or self.hooks.save is None:
            return "nothing was saved, as no step was applied before" if self.hooks.save else "this run saves nothing"
        self.state.seconds = self.meter.seconds
        try:
            return f"the weights before it are saved whole: {self.hooks.save(self.state)}"
        except FloatingPointError as error:
            return str(error)

    def log(self, learning_rate: float) -> str:
        """Write a line of history about the steps since the last one; return it for the progress bar."""
        record: dict[str, Any] = {"step": self.state.step, "learning_rate": learning_rate}
        record[self.meter.unit] = self.state.tokens
        if self.state.window_items:
            record["loss"] = self.state.window_loss / self.state.window_items
            record["grad_norm"] = self.grad_norm
        record |= self.meter.lap(self.window_tokens)
        record["seconds"] = round(self.meter.seconds, 3)
        self.state.window_loss, self.state.window_items, self.window_tokens = 0.0, 0, 0
        self._write(record)
        mfu = f", MFU {record['mfu']:.1%}" if "mfu" in record else ""
        loss, speed = record.get("loss", math.nan), f"{self.meter.unit}_per_second"
        return f"loss {loss:.4f}, lr {learning_rate:.2e}, {record[speed]:,.0f} {self.meter.unit}/s{mfu}"

    def evaluate_if_due(self) -> None:
        """Evaluate where an evaluation is due; random numbers drawn meanwhile do not disturb training."""
        evaluate, state = self.hooks.evaluate, self.state
        if evaluate is None or not self.is_due(self.args.eval_steps) or state.evaluated_step == state.step:
            return
        with self.meter.paused(), preserved_rng_state():
            state.metrics = dict(evaluate())
        state.evaluated_step = state.step
        self._write({"step": state.step, **state.metrics})
        if self.accelerator.is_main_process:
            Bar.write(evaluation_line(state.step, state.metrics))
        if self.args.early_stopping_patience:
            self._compare()

    def _compare(self) -> None:
        """Note whether the evaluation was the best one.  Raises: UserError if it does not have the main metric."""
        state, metric = self.state, self.hooks.main_metric
        if metric not in state.metrics:
            raise UserError(
                f"early_stopping_patience={self.args.early_stopping_patience} goes by {metric}, and the evaluation "
                f"has {', '.join(state.metrics) or 'nothing'}; give validation rows, or leave it out"
            )
        if is_better(state.metrics[metric], state.best, lower=lower_is_better(metric)):
            state.best, state.best_step, state.worse = state.metrics[metric], state.step, 0
        else:
            state.worse += 1

    @property
    def is_over(self) -> bool:
        """Whether the run ends early."""
        return is_exhausted(self.args.early_stopping_patience, self.state.worse)

    @property
    def must_save(self) -> bool:
        """Whether a checkpoint is due, or this step is the best, or the last one."""
        return self.is_due(self.args.save_steps) or self.state.best_step == self.state.step or self.is_over

    def save(self) -> None:
        """Save the run as it is now."""
        if self.hooks.save is None:
            return
        self.read()
        self.state.seconds = self.meter.seconds
        with self.meter.paused():
            self.hooks.save(self.state)

    def load_best(self) -> None:
        """Put the weights of the best evaluation into the model and measure them, unless the last one was the best."""
        state, metric = self.state, self.hooks.main_metric
        if self.hooks.load_best is None or self.hooks.evaluate is None or state.best_step in (0, state.step):
            return
        self.accelerator.print(f"the best of the run, {metric} {state.best:.6g}, was that of step {state.best_step}")
        self.hooks.load_best(state)
        state.metrics = dict(self.hooks.evaluate())

    def _write(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.history.append(record)
            if self.hooks.log is not None:
                self.hooks.log(record)
