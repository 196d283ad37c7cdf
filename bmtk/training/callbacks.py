"""What fine-tuning with `transformers.Trainer` shares with the project's own loop: history, averages, orderly stop."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .averaging import WeightAverage
from .history import History
from .progress import Bar, evaluation_line
from .signals import StopRequest, stopped

PREFIXES = {"eval_": "validation/", "validation_": "validation/", "test_": "test/"}
NOT_RECORDED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class RecordHistory(TrainerCallback):
    """Writes what Trainer logs to `history.jsonl`, under the names of the project's own loop."""

    def __init__(self, directory: str | Path, *, unit: str = "tokens"):
        self.history = History(directory)
        self.unit = unit  # what `state.num_input_tokens_seen` counts, padding left out
        self.seconds = 0.0  # of training, with the time before a resumption
        self.units = 0
        self.is_training = False
        self.started = 0.0  # by the clock, less the seconds before a resumption
        self.last_units, self.last_time = 0, 0.0  # when the last line was written

    @property
    def throughput(self) -> dict[str, float]:
        """Mean speed of the whole run, evaluations and checkpoints included."""
        return {f"{self.unit}_per_second": self.units / self.seconds} if self.units and self.seconds else {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.history.cut(after=state.global_step)
        former = [record["seconds"] for record in self.history.read() if "seconds" in record]
        self.started = time.monotonic() - (former[-1] if former else 0.0)
        self.last_units, self.last_time = state.num_input_tokens_seen, time.monotonic()
        self.is_training = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_training:
            self.seconds = time.monotonic() - self.started
            self.units = state.num_input_tokens_seen
        self.is_training = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        assert logs is not None
        record = self._training(state, logs) if "loss" in logs else recorded_metrics(logs)
        if record and self.is_training:
            self.history.append({"step": state.global_step, **record})

    def _training(self, state: TrainerState, logs: Mapping[str, float]) -> dict[str, float]:
        if not self.is_training:  # only the main process has a clock
            return {}
        now = time.monotonic()
        units = state.num_input_tokens_seen - self.last_units
        speed = {self.unit: state.num_input_tokens_seen, f"{self.unit}_per_second": units / (now - self.last_time)}
        self.last_units, self.last_time = state.num_input_tokens_seen, now
        values = {
            key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "epoch", "num_overflows") if key in logs
        }
        return {**values, **(speed if units else {}), "seconds": now - self.started}


def recorded_metrics(logs: Mapping[str, float]) -> dict[str, float]:
    """Trainer's `eval_accuracy` as `validation/accuracy`; its timings and everything else are left out."""
    return {
        new + key.removeprefix(old): value
        for old, new in PREFIXES.items()
        for key, value in logs.items()
        if key.startswith(old) and not key.endswith(NOT_RECORDED)
    }


class ProgressBar(ProgressCallback):
    """Trainer's progress bar with the last loss beside it, and a line for each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.current_step = 0
        self.training_bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training_bar is not None:  # of the run before it went back to a checkpoint
            self.training_bar.close()
        if state.is_world_process_zero:
            shape: Any = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = Bar(**shape, unit="step", dynamic_ncols=True)
        self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.1e}", refresh=False)
        elif metrics := recorded_metrics(logs):
            self.training_bar.write(evaluation_line(state.global_step, metrics))


class HasAverage(Protocol):
    """A trainer that may keep an average of the weights."""

    average: WeightAverage | None
    was_skipped: bool  # whether the last step was not applied


class AverageWeights(TrainerCallback):
    """Keeps the trainer's average of the weights up to date, and leaves it in the model at the end."""

    def __init__(self, trainer: HasAverage):
        self.trainer = trainer

    @property
    def average(self) -> WeightAverage:
        """The trainer makes it with the optimizer, after the callbacks."""
        assert self.trainer.average is not None
        return self.trainer.average

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.average.update(unless=self.trainer.was_skipped)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:  # Trainer has loaded the raw weights from it
            self.average.load(Path(state.best_model_checkpoint))
        self.average.apply()


class StopOnRequest(TrainerCallback):
    """After a signal or `max_minutes`, finishes the step, saves a checkpoint that resumes exactly, and ends."""

    def __init__(self, request: StopRequest):
        self.request = request
        self.is_asked = False  # some process got a signal
        self.is_due = False  # the next save is the last

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_asked = self._any_process_was_asked(args)
        # at the end of an epoch, the evaluation that is due there is to be part of the checkpoint
        self.is_due = self.is_asked and state.epoch % 1 != 0
        control.should_save |= self.is_due

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_due = self.is_asked
        control.should_save |= self.is_due

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_due:
            raise stopped(self.request, state.global_step, state.max_steps)

    def _any_process_was_asked(self, args: TrainingArguments) -> bool:
        asked = bool(self.request)
        if not torch.distributed.is_initialized():
            return asked
        flag = torch.tensor(float(asked), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)
