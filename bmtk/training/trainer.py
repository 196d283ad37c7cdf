"""Trainer whose loss and metrics are exact."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from bmtk.errors import UserError, is_out_of_memory
from bmtk.files import adding_to_folder

from .adapters import ADAPTER_CONFIG
from .allocation import keep_freed_memory
from .arguments import AUTO
from .averaging import WeightAverage
from .batch_sampler import EpochSampler, EvenBatchSampler
from .callbacks import AverageWeights, ProgressBar, RecordHistory, StopOnRequest
from .disk_space import check_room
from .ending import ending_together
from .evaluation import Results, measure, predict_all
from .finetuning_arguments import FineTuningArguments
from .gradients import gradient_rules
from .guards import SavedBuffers
from .layers import decay_rates_by_depth
from .micro_batches import (
    MicroBatches,
    fits,
    free_memory,
    largest_fitting,
    on_all,
    refuse_to_go_on_alone,
    split_rows,
)
from .optimizers import NamedOptimizer, OptimizerSettings, build_optimizer, trained_parameters
from .protocols import Batch, Prediction, TrainingObjective
from .resume import checkpoint_to_resume, step_of
from .rng_state import RngState, set_rng_state
from .run_folder import CHECKPOINTS
from .signals import deferred_signals
from .trainer_guard import GoBack, Guard, refuse_broken_weights
from .trainer_patches import SetEpoch, StopEarly, look_for_lomo_once
from .trainer_sharding import ShardedTrainer, spread
from .updates import Losses, LossSum


@dataclass
class BegunStep:
    """The micro-batches of an optimizer step so far, and what was before it, so that it can be begun again."""

    buffers: SavedBuffers
    randomness: RngState
    batches: list[Batch] = field(default_factory=list)

    def undo(self, model: torch.nn.Module) -> None:
        """Make everything what it was, but for the optimizer, which has not been stepped yet."""
        model.zero_grad(set_to_none=True)
        self.buffers.restore()
        set_rng_state(self.randomness)


class TaskTrainer(ShardedTrainer):
    """Trainer of an objective, which is asked for losses and metrics where Trainer averages averages.

    - A loss is a sum over the items of the whole optimizer step divided by their number, also for models that accept
      `num_items_in_batch` and drop it, and for labels that are not one tensor.
    - The steps of several processes are those of one with as large a batch, also where the rows of an epoch run out.
    - An evaluation sees every row once on any number of processes, keeps a prediction for each instead of its logits,
      and scores all of them at once; Trainer's loss is a mean of batch means in which rows that fill up the last
      batches count twice.
    - Where rows have a `length`, those of an evaluation are batched longest first; predictions are in the rows' order.
    - `optimizer` names one of the project's own, with its groups of parameters.
    - Layers are unfrozen, and an L1 penalty added, as in the project's own loop.
    - An average of the weights (`ema_decay`) is evaluated, compared, and left in the model at the end.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the items of the whole step
    args: FineTuningArguments
    objective: TrainingObjective
    model: Any  # a PreTrainedModel or PeftModel; Trainer's own annotations are wider
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: FineTuningArguments,
        objective: TrainingObjective,
        *,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        super().__init__(
            model,
            args,
            train_dataset=objective.training_rows(),
            eval_dataset=objective.preview_rows(),
            processing_class=objective.processor,
            data_collator=objective.collator(),
            callbacks=list(callbacks),
        )
        self.counts: list[int] = []  # items of the micro-batches of a step that are still to come
        self.losses: list[torch.Tensor] = []  # of the micro-batches of a step, times the processes
        self.begun: BegunStep | None = None
        self.num_overflows = 0  # steps that fp16's scaler has skipped
        self.was_skipped = False  # whether the last step was not applied
        folder = Path(args.output_dir).parent
        self.guard = Guard(self, folder)
        self.add_callback(self.guard)
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(SetEpoch(self.train_dataset))
        self.objective = objective
        num_rows = len(self.train_dataset)
        steps = {"steps_per_epoch": args.steps_per_epoch(num_rows), "total": args.total_steps(num_rows)}
        self.gradient_rules = gradient_rules(model, args, **steps)
        if args.ema_decay:
            self.add_callback(AverageWeights(self))
        if args.early_stopping_patience:
            self.add_callback(StopEarly(args.early_stopping_patience))
        self.losses_of_rows = Losses.of(objective, label_smoothing=args.label_smoothing_factor)
        self.loss = LossSum(model, cast(PreTrainedModel, model), args.device, self.losses_of_rows)
        rows = args.per_device_train_batch_size
        self.micro_batches = MicroBatches(folder, self.accelerator, objective.check_micro_batches, rows=rows)
        self.is_rehearsed = args.world_size == 1

    def count_items_and_units(self, batches: Sequence[Batch]) -> tuple[int, int]:
        self.counts = [int(self.objective.num_items(batch)) for batch in batches]
        return sum(self.counts), sum(int(self.objective.num_units(batch)) for batch in batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The batch's summed loss over the items of the step; times the processes, which average their gradients."""
        assert not return_outputs
        assert isinstance(num_items_in_batch, torch.Tensor)
        self.loss.model = model  # wrapped for several devices
        items = self.counts.pop(0) if self.counts else int(self.objective.num_items(inputs))
        loss = self.loss(inputs, items, num_items_in_batch)
        return loss * self.args.world_size if self.args.world_size > 1 else loss

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of a micro-batch; after the step's last one, `gradient_rules`, before the clipping.

        Where memory is too little, the step is begun again with smaller micro-batches.
        """
        if self.begun is None or not self.losses:
            self.begun = BegunStep(self.guard.buffers, self.guard.randomness)
            self.loss_before = self._tr_loss.clone()
        self.begun.batches.append(inputs)
        todo = [inputs]
        while (loss := self._within_memory(model, todo, num_items_in_batch)) is None:
            todo = self.begun.batches
        if self.gradient_rules and self.accelerator.sync_gradients:
            self.gradient_rules(self.state.global_step, scale=self.scaler.get_scale() if self.scaler else 1.0)
        return loss

    def _within_memory(
        self, model: torch.nn.Module, batches: Sequence[Batch], num_items: torch.Tensor | int | None
    ) -> torch.Tensor | None:
        """Forward and backward of micro-batches, and the loss of the last one; None if memory was too little.

        The step is then as before it had begun, and its micro-batches are smaller from now on.
        """
        self._rehearse(batches[-1])
        step, losses, begun = self.state.global_step, list[torch.Tensor](), self.begun
        rows = self.micro_batches.at(step)
        parts = [self._parts(batch) for batch in batches]
        try:
            for part in [part for each in parts for part in each][:-1]:
                with self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, part, num_items))
            losses.append(super().training_step(model, parts[-1][-1], num_items))
            self.losses += losses
            return sum_of(losses[-len(parts[-1]) :])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        assert begun is not None
        begun.undo(model)
        self.losses = []
        self.micro_batches.halve(step, rows, share=self.args.rows_per_step, model=self.model)
        refuse_to_go_on_alone(self.accelerator)
        free_memory()
        return None

    def _parts(self, batch: Batch) -> list[Batch]:
        """A collated batch, cut if memory was too little for as many rows."""
        rows = self.micro_batches.at(self.state.global_step)
        if rows >= self.micro_batches.rows:
            return [batch]  # which may have more windows than rows
        return split_rows(batch, rows if self.objective.batch_can_be_cut else None)

    def _rehearse(self, batch: Batch) -> None:
        """On several processes, halve the micro-batches until the first one fits on all of them."""
        if self.is_rehearsed:
            return
        model, step = self.accelerator.unwrap_model(self.model), self.state.global_step
        while not self.is_rehearsed:
            rows = self.micro_batches.at(step)
            fitted = fits(model, self._parts(batch)[0], self.losses_of_rows, self.accelerator)
            self.is_rehearsed = on_all(fitted, self.accelerator)
            if not self.is_rehearsed:
                is_writer = self.args.process_index == 0
                self.micro_batches.halve(step, rows, share=self.args.rows_per_step, model=model, is_writer=is_writer)

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, or None."""
        return self.accelerator.scaler

    def loss_of_step(self) -> torch.Tensor:
        """The loss of the last optimizer step, of all processes together; nan or infinite if one of them has such."""
        loss, self.losses = sum_of(self.losses), []
        return self.accelerator.reduce(loss, "mean") if self.args.world_size > 1 else loss

    @property
    def left_out(self) -> Sequence[int]:
        """Steps in the order of the data that no step takes rows from."""
        return self.guard.known.left_out

    @property
    def can_skip(self) -> bool:
        """Whether the optimizer leaves a step without gradients out; DeepSpeed's does not."""
        return not self.is_deepspeed_enabled

    @property
    def rows_are_known(self) -> bool:
        """Whether `places` knows the rows of a step, so that they can be left out, too."""
        return isinstance(self.train_sampler, EpochSampler)

    def places(self, step: int) -> tuple[list[int], list[int]]:
        """The rows of a step in the order of the data that are this process's, and the epoch of each."""
        epoch, step = divmod(step, self.args.steps_per_epoch(len(self.train_dataset)))
        order, size = EpochSampler(self.train_sampler.sampler, self.train_sampler.seed), self._rows_per_step
        order.set_epoch(epoch)
        rows, world = list(order)[step * size : (step + 1) * size], self.args.world_size
        sizes = {"num_processes": world, "num_groups": self.args.gradient_accumulation_steps}
        batches = EvenBatchSampler(rows, self.args.train_batch_size, False, **sizes)
        own = [row for batch in list(batches)[self.args.process_index :: world] for row in batch]
        return own, [epoch] * len(own)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, of steps that were applied; with the number of those that fp16 has skipped where there were any."""
        facts = {"grad_norm": self.guard.grad_norm} if "grad_norm" in logs else {}
        facts |= {"num_overflows": self.num_overflows} if self.num_overflows and "loss" in logs else {}
        super().log({**logs, **facts}, start_time)

    def _write_checkpoint(self, folder: Path) -> None:
        super()._write_checkpoint(folder)
        if self.args.should_save:
            self.guard.save(folder)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `optimizer` or `optim` names, with the rates of `layer_lr_decay`; and the average."""
        if self.args.optimizer and self.optimizer is None:
            self.optimizer = build_optimizer(self.model, cast(OptimizerSettings, self.args))
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            decay_rates_by_depth([optimizer], self.model, self.args.layer_lr_decay)
        if is_new and self.is_spread:
            optimizer = self.optimizer = NamedOptimizer([optimizer], trained_parameters(self.model))
        if self.args.ema_decay:
            self.average = WeightAverage(trained_parameters(self.model), self.args.ema_decay)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the run; `wsd` decays over its `decay_fraction`, at most what the warm-up leaves."""
        if self.args.schedule == "wsd":
            left = num_training_steps - self.args.get_warmup_steps(num_training_steps)
            decay = min(left, round(self.args.decay_fraction * num_training_steps))
            self.args.lr_scheduler_kwargs = {"num_decay_steps": decay, "decay_type": "linear"}
        return super().create_scheduler(num_training_steps, optimizer)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the rows, in the order of `_reading_order`."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world, order = self.args.process_index, self.args.world_size, self._reading_order(rows)
        share = Subset(rows, order[len(rows) * rank // world : len(rows) * (rank + 1) // world])
        workers = self.args.dataloader_num_workers
        return DataLoader(share, self.args.eval_batch_size, collate_fn=self.data_collator, num_workers=workers)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def _reading_order(self, rows: Any) -> list[int]:
        """The longest rows first, so that a batch holds little padding; in their own order if no lengths are known."""
        if self.args.length_column_name not in getattr(rows, "column_names", ()):
            return list(range(len(rows)))
        order: list[int] = np.argsort(-np.asarray(rows[self.args.length_column_name]), kind="stable").tolist()
        return order

    def predictions(self, dataloader: DataLoader[Any], description: str, *, preview: bool = False) -> list[Prediction]:
        """A prediction for each row of the loader's split, in the rows' order, from all processes."""
        scorer = self.objective.scorer
        predictions = predict_all(
            self.model.to(self.args.device),
            dataloader,
            self.accelerator,
            scorer.preview if preview else scorer.predict,
            description=description,
            num_batches=len(dataloader),
            show_progress=not self.args.disable_tqdm,
        )
        return [predictions[place] for place in np.argsort(self._reading_order(_all_rows(dataloader)))]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Metrics over all rows at once, of the averaged weights where there are any."""
        with self.average.applied() if self.average else nullcontext():
            predictions = self.predictions(dataloader, description, preview=metric_key_prefix == "eval")
        rows = _all_rows(dataloader)
        metrics = self.objective.scorer.score(predictions, rows)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(cast(Any, predictions), label_ids=None, metrics=named, num_samples=len(rows))


def sum_of(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of 0-dim tensors; mostly there is one."""
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum()


def _all_rows(dataloader: DataLoader[Any]) -> Any:
    """The rows of which a loader of an evaluation reads this process's share."""
    return cast(Any, dataloader.dataset).dataset


def build_trainer(
    model: PreTrainedModel | PeftModel,
    objective: TrainingObjective,
    args: FineTuningArguments,
    *,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> TaskTrainer:
    """The trainer of the objective's rows, with its loss and metrics, and with checkpoints in `folder`.

    Raises: UserError as `check_whole_weights`.
    """
    if args.channels_last:
        lay_out_channels_last(model, args.device)
    args.output_dir = str(folder)
    args.dataloader_pin_memory &= torch.cuda.is_available()
    args.remove_unused_columns = False  # the rows hold what the collator reads
    args.include_num_input_tokens_seen = "no"  # counted by the objective
    look_for_lomo_once()
    trainer = TaskTrainer(model, args, objective, callbacks=callbacks)
    check_whole_weights(args, is_sharded=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    return trainer


def check_whole_weights(args: FineTuningArguments, *, is_sharded: bool) -> None:
    """Raises: UserError for settings that read or change single parameters, if devices hold parts of them."""
    given = {name: getattr(args, name) for name in ("ema_decay", "l1_penalty", "optimizer", "unfreeze_epochs")}
    if is_sharded and any(given.values()):
        settings = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise UserError(
            f"{settings}: not under FSDP or DeepSpeed, because whole weights are needed on every device; leave out "
            "one or the other"
        )


def lay_out_channels_last(model: torch.nn.Module, device: torch.device) -> None:
    """Put the channels of the weights last in memory, and with them those of all maps that convolutions make.

    Raises: UserError for a strided 1x1 convolution on a CPU: oneDNN's backward of it writes beyond its memory
    (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and device.type == "cpu":
            if module.kernel_size == (1, 1) and module.stride != (1, 1):
                raise UserError(
                    f"channels_last is not safe on a CPU for a strided 1x1 convolution ({name}); leave it out"
                )
    cast(Any, model).to(memory_format=torch.channels_last)  # an overload that torch leaves out of its annotations


def evaluate(trainer: TaskTrainer) -> Results:
    """Measure the trained model on the validation and test rows."""
    objective = trainer.objective

    def predict_split(split: str) -> list[Prediction]:
        return trainer.predictions(trainer.get_eval_dataloader(objective.rows[split]), split)

    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    return measure(objective, model, predict_split, seed=args.seed, draws=args.should_save)


def train(
    model: PreTrainedModel | PeftModel, objective: TrainingObjective, args: FineTuningArguments, history: RecordHistory
) -> TaskTrainer:
    """Train to the end of the run, from the newest checkpoint in `args.output_dir` if there is one.

    Raises: Stopped after a signal or `args.max_minutes`, when the step is finished and saved.
    """
    keep_freed_memory(args.device)
    spread(model, args)
    folder = Path(args.output_dir)
    stopping: Any = {"second_stops_at_once": args.world_size == 1, "max_minutes": args.max_minutes}
    with deferred_signals(**stopping) as request:
        callbacks = [history, StopOnRequest(request)]
        trainer = build_trainer(model, objective, args, folder=folder / CHECKPOINTS, callbacks=callbacks)
        if args.micro_batch_size == AUTO:
            cut_by_memory(trainer)
            trainer = build_trainer(model, objective, args, folder=folder / CHECKPOINTS, callbacks=callbacks)
        trainer.accelerator.wait_for_everyone()  # what the main process deletes is gone
        checkpoint = checkpoint_to_resume(folder, args.resume_from_checkpoint)
        if checkpoint:
            trainer.accelerator.print(f"going on from {checkpoint}")
        if trainer.args.should_save:
            step, total = step_of(Path(checkpoint)) if checkpoint else 0, args.total_steps(len(trainer.train_dataset))
            check_room(args, trainer.model, saves=args.saves_to_come(step, total), folder=folder)
        with ending_together(trainer.accelerator):
            train_from(checkpoint, trainer)
    return trainer


def train_from(checkpoint: str | None, trainer: TaskTrainer) -> None:
    """Train to the end of the run, from `checkpoint` on if there is one, and again from each that it goes back to.

    Raises: UserError for a step that may not be skipped; Diverged if skipping and going back do not help.
    """
    while True:
        if checkpoint:
            trainer.guard.load(Path(checkpoint))
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except GoBack as back:
            checkpoint = str(back.folder)
        else:
            return


def cut_by_memory(trainer: TaskTrainer) -> None:
    """Set how many rows the arguments take at a time: as many as fit into memory, or as the run has found before."""
    args, sizes = trainer.args, trainer.micro_batches
    share = args.rows_per_step
    if not sizes.limits:
        rows = largest_fitting(share, trainer.objective, trainer.model, trainer.losses_of_rows, trainer.accelerator)
        sizes.limit(0, rows, is_writer=args.process_index == 0)
    args.per_device_train_batch_size = sizes.at(0)
    args.gradient_accumulation_steps = share // args.per_device_train_batch_size


def save(trainer: TaskTrainer, directory: str | Path, *, merge: bool) -> None:
    """Write the trained model (or its adapter; `merge` adds it to the weights first) and its processor; all ranks.

    Raises: UserError as `refuse_broken_weights`.
    """
    if merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model_wrapped = trainer.model
    refuse_broken_weights(trainer.model, trainer.state.global_step)
    if not trainer.is_world_process_zero():
        trainer.save_model(str(directory))  # takes part in gathering weights that are spread over processes
        return
    is_adapter = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    with adding_to_folder(directory, last=ADAPTER_CONFIG if is_adapter else "config.json") as beside:
        trainer.save_model(str(beside))
        (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle that no one should load
