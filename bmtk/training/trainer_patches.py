"""What transformers 5.23 and accelerate 1.15 do wrong for this project, mended in one place.

Every private method of Trainer that is overridden, every change to accelerate's samplers, and every callback that
mends another stands here with the fault behind it.  tests/training/test_trainer_patches.py runs the plain libraries,
and fails as soon as an installed version no longer has a fault: then its patch is deleted.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from bmtk.errors import UserError

from .averaging import WeightAverage
from .batch_sampler import EpochSampler, EvenBatchSampler
from .early_stopping import is_better, is_exhausted
from .protocols import Batch


class PatchedTrainer(Trainer):
    """`transformers.Trainer` that counts, resumes, ends and shares out rows as the project's own loop does.

    A subclass says what is counted, and sets `average` where one is kept.
    """

    average: WeightAverage | None = None
    train_sampler: Any = None  # the order of the rows: a function of seed and epoch

    def count_items_and_units(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """How many losses of this process's `batches` are summed, and how many units of throughput they hold."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Fault (transformers 5.23): counts labels that are one tensor, and nothing where a model has other ones.

        It also counts nothing for a model that does not take the count, whose loss is then a mean of means.
        """
        totals = torch.tensor(self.count_items_and_units(batch_samples), device=device)
        totals = self.accelerator.reduce(totals) if self.args.world_size > 1 else totals
        self.state.num_input_tokens_seen += int(totals[1])  # the one counter of units that a checkpoint keeps
        return totals[0].clamp(min=1)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Fault (transformers 5.23): groups rows by length in an order that the process's own generator draws.

        Dropout moves that generator on, so a run that is resumed past its first epoch would have other batches.  The
        groups are also made of the rows of one process: several would have other batches than one.
        """
        args = self.args
        try:
            sampler: Any = super()._get_train_sampler(train_dataset)
        except ValueError as error:
            raise UserError(
                f"train_sampling_strategy={args.train_sampling_strategy}: the rows of this task have no lengths; "
                "choose random or sequential"
            ) from error
        seed = args.seed if args.data_seed is None else args.data_seed
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= max(1, args.world_size)
        if isinstance(sampler, (RandomSampler, LengthGroupedSampler)):
            sampler = EpochSampler(sampler, seed)
        elif isinstance(sampler, BatchRebalanceSampler):
            sampler.seed = seed  # 42 otherwise, whatever the seed of the run
        self.train_sampler = sampler
        return sampler

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Fault (transformers 5.23): trains a step though a callback has asked to stop when training began.

        A resumed run that had stopped early would train on.  Fault (accelerate 1.15): on several processes,
        the order of an epoch that is resumed in its middle is that of the first one.
        """
        if hasattr(self.train_sampler, "set_epoch"):
            self.train_sampler.set_epoch(kwargs["epoch"])
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)  # type: ignore[no-untyped-call]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Fault (transformers 5.23): calls no callback before trainer_state.json, with which a checkpoint is whole.

        So the averaged weights are written here: a kill leaves no checkpoint that seems whole and lacks them.
        """
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average and self.args.should_save:
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Fault (torch 2.13): a scheduler's load_state_dict leaves the optimizer's learning rates as they were.

        A torch optimizer restores them itself; a NamedOptimizer's state does not hold them.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.average and checkpoint:
            self.average.load(Path(checkpoint))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Fault (accelerate 1.15): fills the last batches of an epoch up with rows that were trained on before.

        Without `even_batches` some processes have a batch less, and the others wait for it forever.
        """
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and type(batches := shard.batch_sampler) is BatchSampler:
            settings = batches.sampler, batches.batch_size, batches.drop_last
            shard.batch_sampler = EvenBatchSampler(*settings, num_processes=shard.num_processes)
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
