"""What transformers 5.23 and accelerate 1.15 do wrong for this project, mended in one place.

Every private method of Trainer that is overridden for what it computes, every change to accelerate's samplers, and
every callback that mends another stands here with the fault behind it; `trainer_steps` has what shortens steps.
tests/training/test_trainer_patches.py runs the plain libraries, and fails as soon as an installed version no longer
has a fault: then its patch is deleted.
"""

import functools
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from bmtk.errors import UserError
from bmtk.files import PARTIAL

from .averaging import WeightAverage
from .batch_sampler import EpochSampler, EvenBatchSampler, grouped_by_length
from .disk_space import checkpoint_bytes
from .early_stopping import is_better, is_exhausted
from .manifest import damages, dump_json, written_whole
from .protocols import Batch
from .resume import BATCH, PREFIX, batch_facts, check_best, delete_older
from .rng_state import seed_process
from .rollback import data_step
from .trainer_guard import refuse_broken_weights
from .trainer_steps import LeanTrainer

logger = logging.getLogger(__name__)


def look_for_lomo_once() -> None:
    """Fault (accelerate 1.15): its optimizer searches the disk for a package, lomo_optim, twice in every step."""
    cast(Any, accelerate.optimizer).is_lomo_available = functools.cache(accelerate.utils.is_lomo_available)


class PatchedTrainer(LeanTrainer):
    """`transformers.Trainer` that counts, resumes, ends and shares out rows as the project's own loop does.

    A subclass says what is counted, and sets `average` where one is kept.
    """

    average: WeightAverage | None = None
    grad_norm: float | torch.Tensor | None = None  # of the last step, before clipping
    train_sampler: Any = None  # the order of the rows: a function of seed and epoch
    loss_before: torch.Tensor  # summed for the next line of the log, before the step that is being made

    @property
    def left_out(self) -> Sequence[int]:
        """Steps in the order of the data, counted from 0, that no step takes rows from."""
        return ()

    def count_items_and_units(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """How many losses of this process's `batches` are summed, and how many units of throughput they hold."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Fault (transformers 5.23): counts labels that are one tensor, and nothing where a model has other ones.

        It also counts nothing for a model that does not take the count, whose loss is then a mean of means.
        """
        items, units = self.count_items_and_units(batch_samples)
        if self.args.world_size > 1:
            items, units = self.accelerator.reduce(torch.tensor([items, units], device=device)).tolist()
        self.state.num_input_tokens_seen += units  # the one counter of units that a checkpoint keeps
        return torch.tensor(max(1, items), device=device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Fault (transformers 5.23): groups rows by length in an order that the process's own generator draws.

        Dropout moves that generator on, so a run that is resumed past its first epoch would have other batches.  The
        groups are also made of the rows of one process: several would have other batches than one.  And every row is
        read for its length: 6 seconds of a million, 40 where their tokens are dropped at random.
        """
        args = self.args
        try:
            rows = self.train_dataset if train_dataset is None else train_dataset
            sampler: Any = grouped_by_length(rows, self.model, args)
            sampler = sampler or super()._get_train_sampler(train_dataset)
        except ValueError as error:
            raise UserError(
                f"train_sampling_strategy={args.train_sampling_strategy}: the rows of this task have no lengths; "
                "choose random or sequential"
            ) from error
        seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= max(1, args.world_size)
        if isinstance(sampler, (RandomSampler, LengthGroupedSampler, SequentialSampler)):
            sampler = EpochSampler(sampler, seed)
        elif isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = seed  # 42 otherwise, whatever the seed of the run
        self.train_sampler = sampler
        return sampler

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Fault (transformers 5.23): trains a step though none is left, or a callback has asked to stop at the begin.

        A run whose `max_steps` end inside an epoch, or that had stopped early, would train on when it is resumed.
        Fault (accelerate 1.15): on several processes, the order of an epoch that is resumed in its middle is that of
        the first one.
        """
        if hasattr(self.train_sampler, "set_epoch"):
            self.train_sampler.set_epoch(kwargs["epoch"])
        kwargs |= self._without_left_out(
            kwargs["epoch"], kwargs["num_update_steps_per_epoch"], kwargs["steps_in_epoch"]
        )
        is_over = self.control.should_training_stop or self.state.global_step >= self.state.max_steps
        if not is_over and kwargs["num_update_steps_per_epoch"]:
            super()._run_epoch(**kwargs)

    def _without_left_out(self, epoch: int, steps: int, batches: int) -> dict[str, int]:
        """How many optimizer steps and batches an epoch of `steps` and `batches` has; its sampler leaves the rest out.

        What Trainer calls `steps_in_epoch` are batches.
        """
        gone = [data % steps for data in self.left_out if data // steps == epoch]
        if isinstance(self.train_sampler, EpochSampler):
            rows = self._rows_per_step
            places = (range(step * rows, (step + 1) * rows) for step in gone)
            self.train_sampler.left_out = frozenset(chain.from_iterable(places))
        parts = self.args.gradient_accumulation_steps
        left = batches - sum(min(parts, batches - step * parts) for step in gone)
        return {"num_update_steps_per_epoch": steps - len(gone), "steps_in_epoch": left}

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader[Any]) -> Any:
        """As many epochs as the steps need, where the data of some were left out."""
        num_epochs, steps, *others, total = super().set_initial_training_values(args, dataloader)
        if self.left_out:
            num_epochs = data_step(total - 1, self.left_out) // steps + 1
        return num_epochs, steps, *others, total

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Fault (transformers 5.23): writes into the final folder, without sums, and first deletes older ones.

        Here a checkpoint is written beside, listed with its sums, flushed and renamed, as those of the project's own
        loop are, and with the averaged weights; older ones are deleted after that.
        """
        final = Path(self._get_output_dir(trial)) / f"{PREFIX}{self.state.global_step}"
        beside = final.with_name(f"{PARTIAL}{final.name}")
        refuse_broken_weights(cast(torch.nn.Module, self.model), self.state.global_step)
        self.store_flos()
        if best := self.state.best_global_step:
            self.state.best_model_checkpoint = str(final.with_name(f"{PREFIX}{best}"))
        is_writer, optimizer = self.args.should_save, cast(Any, self.optimizer)
        num_bytes = checkpoint_bytes(cast(Any, self.model), optimizer.state, has_average=bool(self.average))
        with written_whole(final, num_bytes=num_bytes) if is_writer else nullcontext():
            self.accelerator.wait_for_everyone()  # the folder is there
            self._write_checkpoint(beside)
            self.accelerator.wait_for_everyone()  # the generators of all processes are
        if is_writer:
            keep = self.args.save_total_limit or 0
            delete_older(final.parent, PREFIX, step=self.state.global_step, keep=keep, best=best)
        self.accelerator.wait_for_everyone()  # else the end of one process could cut the saving short

    def save_now(self) -> Path:
        """Save a checkpoint unless there is a whole one of this step, and return its folder; called by all processes.

        Raises: UserError as `refuse_broken_weights`.
        """
        folder = Path(self._get_output_dir(None)) / f"{PREFIX}{self.state.global_step}"
        is_due = bool(damages(folder))
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if is_due:
            self._save_checkpoint(self.model_wrapped, None)
        return folder

    def forget_step(self) -> None:
        """Leave the step that is being made out of the mean loss that is logged next: it was not applied."""
        self._tr_loss.copy_(self.loss_before)
        self._globalstep_last_logged += 1

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Fault (transformers 5.23): keeps the norm before clipping from callbacks, which see the clipped gradient.

        Where that norm is infinite, clipping leaves zeros, which look finite.
        """
        self.grad_norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        return self.grad_norm

    def _write_checkpoint(self, folder: Path) -> None:
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.average:
            self._save_average(self.average, folder)
        if not self.args.should_save:
            return
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that no one should load
        state: Any = self.state
        items = (*self.callback_handler.callbacks, self.control)
        state.stateful_callbacks = [item for item in items if isinstance(item, ExportableState)]
        state.__post_init__()  # their states in place of them
        state.save_to_json(str(folder / "trainer_state.json"))
        dump_json(folder / BATCH, {"num_processes": self.args.world_size, "rows_per_step": self._rows_per_step})

    def _save_average(self, average: WeightAverage, folder: Path) -> None:
        if self.args.should_save:
            average.save(folder)

    @property
    def _rows_per_step(self) -> int:
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Fault (transformers 5.23): goes on with another batch size, or without the best model, and says nothing.

        Steps are counted in rows, so with other batches rows are left out or seen twice.  The best checkpoint is the
        one in this run's folder, wherever that was moved.
        """
        counted: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        checkpoint = kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)
        if checkpoint:
            self._check_batch(checkpoint)
        if self.left_out:
            counted = self._place_in_data(kwargs.get("num_update_steps_per_epoch", args[1] if len(args) > 1 else 0))
        if checkpoint and self.args.load_best_model_at_end and (best := self.state.best_global_step):
            folder = Path(self._get_output_dir(None)) / f"{PREFIX}{best}"
            check_best(folder)
            self.state.best_model_checkpoint = str(folder)
        return counted

    def _place_in_data(self, steps: int) -> tuple[int, int]:
        """The epoch (of `steps` optimizer steps) that the run goes on in, and how many of its batches are done."""
        data = data_step(self.state.global_step, self.left_out)
        epoch = data // steps
        done = data % steps - sum(epoch * steps <= number < data for number in self.left_out)
        self.state.epoch = max(self.state.epoch or 0.0, epoch)  # which the augmentation of the rows is drawn from
        return epoch, done * self.args.gradient_accumulation_steps

    def _check_batch(self, checkpoint: str) -> None:
        facts = batch_facts(checkpoint)
        former, rows = facts.get("num_processes", 1), facts.get("rows_per_step", self._rows_per_step)
        if rows != self._rows_per_step:
            raise UserError(
                f"{checkpoint} was saved with {rows} rows per optimizer step (num_processes={former}), and this run "
                f"has {self._rows_per_step} (num_processes={self.args.world_size}); start as many processes as "
                f"before, or start anew in another output_dir with batch_size={rows}, kept on any number of processes"
            )
        if facts and former != self.args.world_size and self.args.process_index == 0:
            logger.warning(
                "%s was saved by %d processes, and %d resume it: the data stay the same, but random numbers (dropout) "
                "do not",
                checkpoint,
                former,
                self.args.world_size,
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Fault (transformers 5.23): leaves the generators as they are, if another number of processes saved them.

        All processes would then draw the same numbers as at the beginning of the run.
        """
        if checkpoint and batch_facts(checkpoint).get("num_processes", self.args.world_size) != self.args.world_size:
            seed_process(self.args.seed, self.args.process_index, self.state.global_step)
        else:
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Fault (torch 2.13): a scheduler's load_state_dict leaves the optimizer's learning rates as they were.

        A torch optimizer restores them itself; a NamedOptimizer's state does not hold them.
        """
        self._read_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.average and checkpoint:
            self.average.load(Path(checkpoint))

    def _read_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        """Fault (transformers 5.23): loads the best weights without a look at whether they are as they were saved."""
        check_best(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _finalize_training(self, *args: Any) -> Any:
        """Fault (transformers 5.23): where one checkpoint is kept, deletes the newest one when it has loaded the best.

        A kill before the final model is saved would then cost all steps since the best one.
        """
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = keep

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Fault (accelerate 1.15): fills the last batches of an epoch up with rows that were trained on before.

        Without `even_batches` some processes have a batch less, and the others wait for it forever.
        """
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and type(batches := shard.batch_sampler) is BatchSampler:
            settings = batches.sampler, batches.batch_size, batches.drop_last
            sizes = {"num_processes": shard.num_processes, "num_groups": self.args.gradient_accumulation_steps}
            shard.batch_sampler = EvenBatchSampler(*settings, **sizes)
            shard.even_batches = False
        return loader


class SetEpoch(TrainerCallback):
    """Passes the number of the epoch to the rows, which draw their augmentation from it.

    Fault (accelerate 1.15): its loaders do so only where no sampler has a `set_epoch`, so neither in an epoch that is
    resumed in its middle nor on several processes.
    """

    def __init__(self, rows: Any):
        self.rows = rows

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rows.set_epoch(int((state.epoch or 0) + 1e-6))  # a fraction where a run is resumed


class StopEarly(EarlyStoppingCallback):
    """Fault (transformers 5.23): EarlyStoppingCallback counts from 0 in a resumed run.

    Trainer restores callbacks under `restore_callback_states_from_checkpoint` only, and with them its own control,
    which a run that was stopped has saved with `should_training_stop`.
    """

    early_stopping_patience_counter: int  # evaluations since the best one

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored = cast(Any, state.stateful_callbacks)[type(self).__name__]["attributes"]
        self.early_stopping_patience_counter = stored["early_stopping_patience_counter"]
        counter, patience = self.early_stopping_patience_counter, self.early_stopping_patience
        control.should_training_stop |= is_exhausted(patience, counter)

    def check_metric_value(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metric_value: float
    ) -> None:
        """Count the evaluations without a better one as the project's own loop does."""
        better = is_better(metric_value, state.best_metric, lower=not args.greater_is_better)
        self.early_stopping_patience_counter = 0 if better else self.early_stopping_patience_counter + 1
