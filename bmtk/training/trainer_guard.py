"""What keeps a broken step out of a model that `transformers.Trainer` trains: decided as in the project's own loop.

A step that is not finite, or spikes, has its gradients dropped on all processes together, so the optimizer leaves
weights and its own state as they are; buffers are what they were before it, and the schedule goes on.
"""

import logging
import math
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bmtk.errors import Diverged, UserError
from bmtk.files import read_json

from .bad_steps import AFTER_CHANGES, BadSteps
from .guards import GuardState, SavedBuffers, SpikeWatch, broken_weights, is_sound
from .manifest import dump_json
from .resume import PREFIX, step_of
from .rng_state import RngState, set_rng_state
from .rollback import checkpoint_between, delete_later
from .spikes import SpikeDetector
from .trainer_steps import OfModel
from .updates import Before

logger = logging.getLogger(__name__)

FILE = "guard.json"  # in a checkpoint of Trainer: a GuardState


class Guarded(Protocol):
    """A trainer whose steps are looked at before they are applied."""

    args: Any
    model: Any
    accelerator: Any
    grad_norm: float | torch.Tensor | None  # of the whole step, before clipping
    num_overflows: int
    was_skipped: bool  # whether the last step was not applied

    @property
    def of_model(self) -> OfModel:
        """The parts of the model, which stay the same while it trains."""

    @property
    def can_skip(self) -> bool:
        """Whether a step without gradients changes nothing."""

    @property
    def rows_are_known(self) -> bool:
        """Whether it is a KnowsRows, and can leave steps of the data out."""

    @property
    def scaler(self) -> Any:
        """That of fp16, which skips steps whose gradients overflow; or None."""

    def loss_of_step(self) -> torch.Tensor:
        """The loss of the last step, of all processes."""

    def forget_step(self) -> None:
        """Leave the step out of the mean loss that is logged next."""

    def save_now(self) -> Path:
        """Save a checkpoint unless there is a whole one of this step, and return its folder."""


class GoBack(Exception):
    """The run is to go on from the checkpoint `folder`, without the data of steps that could not be applied."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder


class Guard(TrainerCallback):
    """Looks at each step before it is applied, and skips it, goes back to a checkpoint, or ends the run.

    Trainer looks at the clipped gradient, hides a loss of nan and saves what comes of it.  Under fp16 a gradient that
    overflows is normal: the gradient scaler skips the step, which is counted; its loss is looked at all the same.
    """

    def __init__(self, trainer: Guarded, directory: Path):
        """`directory` is that of the run."""
        self.trainer, self.args, self.spikes = trainer, trainer.args, SpikeWatch()
        self.known = GuardState()
        self.bad_steps = BadSteps(directory, self.args, trainer.accelerator, self.known)
        watches = self.args.spike_sigma and trainer.can_skip
        self.detector = SpikeDetector(self.args.spike_sigma, torch.device("cpu")) if watches else None
        self.first_step = 0  # of this process, counted from 0
        # Generators before the epoch's loader has drawn from them.
        self.of_epoch: RngState | None = None
        self.randomness = RngState()  # before the step, after its batches were made
        self.before = Before(self.randomness)  # the step
        self.buffers = SavedBuffers(trainer.model.modules())  # before the step
        self.scale = 1.0  # of the scaler, before the step
        self.num_units = 0  # before the batches of the step were counted
        self.is_bad = False  # whether the step has been skipped
        self.grad_norm = 0.0  # of the last step that was applied

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint what it keeps of the steps that were not applied."""
        self.known.recent = self.detector.state() if self.detector else []
        dump_json(checkpoint / FILE, vars(self.known))

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; what this process has left out since it was saved stays so."""
        former, stored = self.known, read_json(checkpoint / FILE)  # which one of a former version does not have
        loaded = GuardState(**stored) if isinstance(stored, dict) else GuardState()
        loaded.left_out = sorted({*loaded.left_out, *former.left_out})
        loaded.failed_at = max(loaded.failed_at, former.failed_at)
        vars(former).update(vars(loaded))  # the account holds the same object
        if self.detector:
            self.detector.restore(loaded.recent)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step, self.num_units = state.global_step, state.num_input_tokens_seen
        self.of_epoch, self.is_bad = None, False
        self.bad_steps.batches = self.trainer if self.trainer.rows_are_known else None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.of_epoch = RngState() if state.global_step > self.first_step else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        window = self.detector.window if self.detector else None
        self.randomness = RngState()
        self.before, self.of_epoch = Before(self.of_epoch or self.randomness, window=window), None
        self.buffers = SavedBuffers(self.trainer.of_model.modules)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss, norm = float(self.trainer.loss_of_step()), float(self.trainer.grad_norm or 0.0)
        self.scale = self.trainer.scaler.get_scale() if self.trainer.scaler else 1.0
        reason = self._what_is_wrong(loss, norm)
        if reason and (self.args.nonfinite == "stop" or not self.trainer.can_skip):
            self._stop(state, reason, loss)
        self.is_bad = bool(reason) or self._spikes(loss, norm)
        if self.is_bad:
            happened = self.bad_steps.note(state.global_step + 1, loss, norm, self.before)
            self.trainer.model.zero_grad(set_to_none=True)  # so that the optimizer has nothing to do
            self.trainer.forget_step()
        else:
            self.grad_norm = norm
        if state.is_world_process_zero and self.is_bad:
            logger.warning("%s", happened)
        elif state.is_world_process_zero:
            self.spikes.see(state.global_step + 1, loss)

    def _what_is_wrong(self, loss: float, norm: float) -> str:
        """Why a step cannot be applied, in words; "" if nothing is not finite."""
        if self.trainer.scaler is None and not math.isfinite(norm):
            return "the gradient is not finite"
        if is_sound(loss):
            return ""
        return "the loss is out of range" if math.isfinite(loss) else "the loss is not finite"

    def _spikes(self, loss: float, norm: float) -> bool:
        """Whether a step spikes; what fp16's scaler skips is not compared with."""
        if self.detector is None:
            return False
        return self.detector.host_sees_spike(loss, norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scaler = self.trainer.scaler
        # Fused AdamW skips in its own kernel, which accelerate's step_was_skipped does not see.
        has_overflown = scaler is not None and scaler.get_scale() < self.scale
        self.trainer.was_skipped = has_overflown or self.is_bad
        if self.trainer.was_skipped:
            self.buffers.restore()
        if not has_overflown:
            return
        self.trainer.num_overflows += 1
        if scaler.get_scale() < 1:
            self._stop(state, "the gradient is not finite, whatever it is scaled by", math.nan)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.num_units = state.num_input_tokens_seen
        if not self.is_bad:
            return
        self.is_bad = False
        self.known.skipped.append(state.global_step)
        if row := self.bad_steps.row_before(state.global_step):
            self._go_back_before(row)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_broken_weights(self.trainer.model, state.global_step)
        if self.trainer.num_overflows and state.is_world_process_zero:
            logger.warning(
                "%d of %d steps were skipped, because their gradients were beyond float16",
                self.trainer.num_overflows,
                state.global_step - self.first_step,
            )

    def _go_back_before(self, row: list[int]) -> NoReturn:
        """Go back to the newest checkpoint from before the steps `row`, and leave their data out from now on.

        Raises: GoBack; Diverged if there is no such checkpoint, or none that was saved since the last time.
        """
        directory, accelerator, found = Path(self.args.output_dir), self.trainer.accelerator, None
        if self.trainer.rows_are_known:
            between = {"at_most": row[0] - 1, "above": self.known.failed_at}
            found = checkpoint_between(accelerator, directory, PREFIX, **between)
        if found is None:
            saved, _ = self._saved_weights()
            remedy = f"lower learning_rate={self.args.learning_rate}, or look at the data of these steps"
            raise Diverged(f"{self.bad_steps.no_way_on(row)}, and {saved}: {remedy}, then run again {AFTER_CHANGES}")
        self.bad_steps.leave_out(row, to=step_of(found), state=self.known)
        delete_later(accelerator, directory, PREFIX, step=step_of(found))
        raise GoBack(found)

    def _stop(self, state: TrainerState, reason: str, loss: float) -> NoReturn:
        step = state.global_step + 1
        self.buffers.restore()
        set_rng_state(self.before.randomness)
        state.num_input_tokens_seen = self.num_units
        remedy = f"lower learning_rate={self.args.learning_rate}, or look for broken rows"
        kept = "nothing was saved, as no step was applied before"
        if state.global_step:
            kept, folder = self._saved_weights()
            remedy += f"; a run in another output_dir goes on from them with model={folder}" if folder else ""
        happened = f"loss {loss:g}, gradient norm {self.trainer.grad_norm}"
        raise UserError(f"step {step}: {reason}, so it was not applied ({happened}); {kept}; {remedy}")

    def _saved_weights(self) -> tuple[str, Path | None]:
        """Save the weights before a step that ends the run; say where they are, or why they were not saved."""
        try:
            folder = self.trainer.save_now()
        except UserError as error:
            return str(error), None
        return f"the weights before it are saved whole in {folder}", folder


def refuse_broken_weights(model: torch.nn.Module, step: int) -> None:
    """Raises: UserError if a weight is not finite."""
    if broken := broken_weights(model):
        raise UserError(
            f"after step {step} the weights are not finite ({', '.join(broken[:3])}), so they were not saved; "
            "checkpoints made before are whole"
        )
