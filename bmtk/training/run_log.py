"""The account of a run while it goes: its state, history.jsonl, progress bar, evaluations and checkpoints."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from bmtk.errors import Diverged, UserError

from .arguments import LoopArguments
from .background import BackgroundSaver
from .bad_steps import AFTER_CHANGES, BadSteps
from .checkpoint import TrainState
from .early_stopping import is_better, is_exhausted
from .evaluation import lower_is_better
from .guards import SpikeWatch
from .history import History
from .progress import Bar, evaluation_line
from .rng_state import preserved_rng_state, seed_process, set_rng_state
from .sharding import ProcessLayout
from .spikes import SpikeDetector
from .throughput import Meter
from .updates import Update
from .waits import named_waits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hooks:
    """What a run calls on its way; each may be None."""

    evaluate: Callable[[], dict[str, float]] | None = None  # metrics; called on every process
    main_metric: str = "validation/loss"  # the one of them used for early stopping
    save: Callable[[TrainState], object] | None = None  # writes a checkpoint; called on every process
    saver: BackgroundSaver = field(default_factory=BackgroundSaver)  # of what `save` writes while the run goes on
    load_best: Callable[[TrainState], object] | None = None  # puts what was saved after state.best_step into the model
    account: Callable[[TrainState], dict[str, float]] | None = None  # what else a line of history.jsonl has
    check_micro_batches: Callable[[int], None] | None = None  # refuses a step of so many micro-batches
    # (at_most, above) -> loads the newest checkpoint of so many steps; see `rollback.roll_back`
    roll_back: Callable[[int, int], TrainState | None] | None = None
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
        detector: SpikeDetector | None = None,
    ):
        """`detector` is the one that the steps are compared by, and is saved and resumed with the state."""
        self.accelerator, self.args, self.state, self.total, self.meter = accelerator, args, state, total, meter
        self.hooks, self.layout = hooks, ProcessLayout.of(args, accelerator.num_processes)
        self.history = History(args.output_dir)
        self.unread: list[Update] = []
        self.window_tokens = 0  # since the meter's last lap
        self.grad_norm: float | None = None
        self.spikes, self.detector = SpikeWatch(), detector
        self.bad_steps = BadSteps(args.output_dir, args, accelerator, state)

    def begin(self) -> None:
        """Forget what came after the resumed step, set the generators, and start the clock."""
        if self.accelerator.is_main_process:
            self.history.cut(after=self.state.step)
        self._take_over()
        self.meter.start(self.state.seconds)

    def _take_over(self) -> None:
        """Make the generators and the detector what they were when the state was saved."""
        if self.state.rng_state is None:
            rank = self.layout.share(self.accelerator.process_index)["rank"]  # same rows, same dropout
            seed_process(self.args.seed, rank, self.state.step)
        else:
            set_rng_state(self.state.rng_state)
            self.state.rng_state = None
        if self.detector:
            self.detector.restore(self.state.recent)

    def bar(self) -> Bar:
        """Make the progress bar, which only the main process shows."""
        hidden = not self.accelerator.is_main_process
        return Bar(total=self.total, initial=self.state.step, unit="step", dynamic_ncols=True, disable=hidden)

    def steps(self) -> Iterator[int]:
        """The steps that are left, counted from 0, until the run ends."""
        while self.state.step < self.total and not self.is_over:
            yield self.state.step

    def add(self, update: Update) -> bool:
        """Count one step; read it at once if it is known to be rejected, or something is due after it.

        Returns whether it counts: False if the run went back to a checkpoint.
        """
        self.state.step += 1
        self.unread.append(update)
        cadences = (self.args.logging_steps, self.args.eval_steps, self.args.save_steps)
        if update.rejected is True or any(self.is_due(steps) for steps in cadences):
            return self.read()
        return True

    def is_due(self, every: int) -> bool:
        """Whether the current step is the last one or a multiple of `every` (0: only the last one)."""
        return self.state.step == self.total or bool(every and self.state.step % every == 0)

    def read(self) -> bool:
        """Read the updates of all processes from the device into the state.

        Returns False if too many of them in a row were rejected, and the run went back to a checkpoint.
        Raises: FloatingPointError for a rejected step that may not be skipped.
        """
        if not self.unread:
            return True
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
                if row := self._reject(step, loss, norm, update):
                    self._go_back_before(row)
                    return False
            else:
                self.state.window_loss += loss * count
                self.state.window_items += count
                self.grad_norm = norm
                self.spikes.see(step, loss)
            self.state.tokens += unit_count
            self.window_tokens += unit_count
        return True

    def _reject(self, step: int, loss: float, norm: float, update: Update) -> list[int]:
        """Note a step that was not applied; return it and those before it if they are too many in a row."""
        happened = self.bad_steps.note(step, loss, norm, update.before)
        if self.args.nonfinite == "stop" and not (math.isfinite(loss) and math.isfinite(norm)):
            self._go_back(step - 1, update)
            remedy = "lower learning_rate or max_grad_norm, look at the data of this step, or set nonfinite to 'skip'"
            raise FloatingPointError(self._last_words(happened, remedy))
        if self.accelerator.is_main_process:
            logger.warning("%s", happened)
        self.state.skipped.append(step)
        return self.bad_steps.row_before(step)

    def _last_words(self, happened: str, remedy: str) -> str:
        return f"{happened}, and {self._save_sound_weights()}: {remedy}, then run again {AFTER_CHANGES}"

    def _go_back_before(self, row: list[int]) -> None:
        """Load the newest checkpoint from before the steps `row`, and leave their data out from now on.

        Raises: Diverged if there is none, or none that was saved since the last time.
        """
        state, failed_at = self.state, row[0] - 1
        loaded = self.hooks.roll_back(failed_at, state.failed_at) if self.hooks.roll_back else None
        if loaded is None:
            remedy = "lower learning_rate, or look at the data of these steps"
            raise Diverged(self._last_words(self.bad_steps.no_way_on(row), remedy))
        self.bad_steps.leave_out(row, to=loaded.step, state=loaded)
        if state.recurrent and loaded.recurrent:  # the updater holds the former object
            state.recurrent.rows, loaded.recurrent = loaded.recurrent.rows, state.recurrent
        vars(state).update(vars(loaded))
        self.unread, self.window_tokens = [], 0
        self._take_over()
        if self.accelerator.is_main_process:
            self.history.cut(after=state.step)

    def _go_back(self, step: int, update: Update) -> None:
        """Be where the run was after `step`: no later one was applied, since the run stops."""
        self.state.step = step
        set_rng_state(update.before.randomness)
        if self.state.recurrent:
            self.state.recurrent.rows = update.before.carried

    def _save_sound_weights(self) -> str:
        """Save the weights before a step that ends the run, which might be the only ones; say where they are."""
        if not self.state.step or self.hooks.save is None:
            return "nothing was saved, as no step was applied before" if self.hooks.save else "this run saves nothing"
        self.state.seconds = self.meter.seconds
        try:
            self._note_recent()
            folder = self.hooks.save(self.state)
            self.hooks.saver.finish()
            return f"the weights before it are saved whole: {folder}"
        except FloatingPointError as error:
            return str(error)

    def log(self, learning_rate: float) -> str:
        """Write a line of history about the steps since the last one; return it for the progress bar."""
        record: dict[str, Any] = {"step": self.state.step, "learning_rate": learning_rate}
        record[self.meter.unit] = self.state.tokens
        if self.state.window_items:
            record["loss"] = self.state.window_loss / self.state.window_items
            record["grad_norm"] = self.grad_norm
        record |= self.meter.lap(self.window_tokens, warms_up=self.state.step == 1)
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
        waits = named_waits(self.accelerator, f"the evaluation after step {state.step}")
        with self.meter.paused(), preserved_rng_state(), waits:
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
        """Save the run as it is now; `all_saved` waits for what is written meanwhile."""
        if self.hooks.save is None:
            return
        self.read()
        self._note_recent()
        self.state.seconds = self.meter.seconds
        with self.meter.paused(), named_waits(self.accelerator, f"the save after step {self.state.step}"):
            self.hooks.save(self.state)

    def named_steps(self) -> AbstractContextManager[None]:
        """Name the step, where a process waits for another too long."""
        return named_waits(self.accelerator, lambda: f"step {self.state.step + 1}")

    @contextmanager
    def all_saved(self) -> Iterator[None]:
        """After the body, or the error that ends it, wait for the checkpoint that is being written.

        Raises: the error of that, if the body has none.
        """
        try:
            yield
        except BaseException:
            try:
                self.hooks.saver.finish()
            except Exception as error:
                logger.warning("process %d: %s", self.accelerator.process_index, error)
            raise
        self.hooks.saver.finish()

    def _note_recent(self) -> None:
        if self.detector:
            self.state.recent = self.detector.state()

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
            record |= self.hooks.account(self.state) if self.hooks.account else {}
            self.history.append(record)
            if self.hooks.log is not None:
                self.hooks.log(record)
