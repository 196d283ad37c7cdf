"""The settings of fine-tuning: Trainer's own, with this project's defaults and the fields of its own loop."""

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks
from transformers.training_args import OptimizerNames, TrainingArguments

from bmtk.errors import UserError

from .arguments import OPTIMIZERS, LoopArguments, SharedArguments, check, not_below_one, too_low
from .disk_space import saves_to_come
from .evaluation import lower_is_better
from .prepared import engines_of_accelerate, natural_precision
from .progress import few_steps_note
from .protocols import TrainingObjective
from .sharding import ProcessLayout
from .trainer_names import SCHEDULER_TYPES, BatchSizes, contradiction, strategy_of

# Fields of Trainer that a shared field can stand for, or that the former ones decide.
TRANSLATED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "lr_scheduler_type"),
    *("bf16", "fp16", "eval_strategy", "save_strategy", "save_steps"),
)
# Keys that may change when a fine-tuning run is resumed: they change how it is watched or stored, not what is learned.
FREE_KEYS = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint logging_steps save_total_limit report_to disable_tqdm "
    "run_name micro_batch_size per_device_eval_batch_size dataloader_num_workers dataloader_pin_memory "
    "merge_adapter max_minutes nonfinite spike_sigma rollback_after fsdp_size "
    "dp_replicate_size".split()
)


def _trainers(text: str) -> Any:
    """A field of TrainingArguments that a shared field can stand for; None: not given."""
    return field(default=None, metadata={"help": f"Trainer's name for {text}"})


def _fixed(default: object) -> Any:
    """A field of TrainingArguments that no command line may set."""
    return field(default=default, init=False)


@dataclass
class FineTuningArguments(SharedArguments, TrainingArguments):  # type: ignore[misc]  # fields of the first win
    """transformers.TrainingArguments without what the recipes do themselves, and without what hides a broken run."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = field(default="outputs/finetune", metadata={"help": "folder of the run and of the final model"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "delete the run that output_dir holds, and start anew"}
    )
    per_device_train_batch_size: int = _trainers("micro_batch_size; without batch_size and both, 8")
    gradient_accumulation_steps: int = _trainers("micro-batches per step on each process; default: as batch_size asks")
    max_steps: int = _trainers("num_train_steps")
    lr_scheduler_type: str = _trainers("schedule, with more choices; without both, linear")
    bf16: bool = _trainers("precision=bf16; without both, that of accelerate launch")
    fp16: bool = _trainers("precision=fp16")
    use_cpu: bool = field(default=False, metadata={"help": "train on the CPU, also where there is another device"})
    eval_strategy: str = _trainers("when to evaluate: no, steps or epoch; without eval_steps, epoch")
    save_strategy: str = _trainers(
        "when to write a checkpoint: no, steps, epoch or best; without save_steps, epoch, or with the evaluations "
        "that the best model is chosen by"
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "rows per device in evaluations"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of history.jsonl"})
    save_total_limit: int | None = field(default=2, metadata={"help": "newest checkpoints to keep beside the best"})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true, or left out: go on from the newest checkpoint in output_dir, if there is one; false: start "
            "anew, for which output_dir must hold no run; or the folder of a checkpoint"
        },
    )

    optimizer: str | None = field(
        default=None,
        metadata={
            "help": "adamw, sgd or muon, the optimizers of recipes/pretrain.py; default: the one that optim names"
        },
    )
    channels_last: bool = field(
        default=False, metadata={"help": "lay out two-dimensional convolutions channels last: often faster"}
    )

    logging_nan_inf_filter: bool = _fixed(False)  # True logs a NaN loss as 0.0
    # A token would be pickled into training_args.bin; publishing is done by bmtk.hub, from the login or HF_TOKEN.
    hub_token: str | None = _fixed(None)
    push_to_hub: bool = _fixed(False)
    hub_model_id: str | None = _fixed(None)
    hub_strategy: str = _fixed("every_save")
    hub_private_repo: bool | None = _fixed(None)
    hub_always_push: bool = _fixed(False)
    hub_revision: str | None = _fixed(None)
    enable_jit_checkpoint: bool = _fixed(False)  # saves at SIGTERM and ends with success: `StopOnRequest` does it
    save_only_model: bool = _fixed(False)  # True resumes with a new optimizer and schedule, without a warning
    ignore_data_skip: bool = _fixed(False)  # True trains on the rows of a begun epoch again when a run is resumed
    include_num_input_tokens_seen: str = _fixed("no")
    remove_unused_columns: bool = _fixed(False)
    batch_eval_metrics: bool = _fixed(False)
    eval_do_concat_batches: bool = _fixed(True)
    label_names: list[str] = field(default_factory=lambda: ["labels"], init=False)  # columns, as Trainer calls them
    do_train: bool = _fixed(False)  # these three are read by Hugging Face's example scripts only
    do_eval: bool = _fixed(False)
    do_predict: bool = _fixed(False)

    tp_size = 1  # Trainer has no part of the rows for several processes to share

    def __post_init__(self) -> None:
        check([*self._wrong_choices(), *self._wrong_numbers(), *self.wrong_settings(), *self._contradictions()])
        self.load_best_model_at_end |= self.early_stopping_patience > 0
        sizes = self.per_device_train_batch_size, self.gradient_accumulation_steps
        batch = BatchSizes(self.batch_size, self.micro_batch_size, *sizes)
        before = {name: getattr(self, name) for name in TRANSLATED}
        chose_device = self.use_cpu
        self._translate()
        self._cut(batch, processes=int(os.environ.get("WORLD_SIZE", "1")))  # DeepSpeed's settings are made of it
        chosen = self.metric_for_best_model, self.greater_is_better
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except ValueError as error:  # of Trainer's own checks, enumerations and JSON, all about settings
            raise UserError(str(error)) from error
        self._check_reporting()
        self._cut(batch, processes=self.world_size * max(1, self.n_gpu))
        self.metric_for_best_model, self.greater_is_better = chosen  # Trainer's default is the loss
        if self.precision and not (self.bf16 or self.fp16):
            self.mixed_precision = "no"  # not that of accelerate launch
        derived = {name for name in TRANSLATED if before[name] is None}
        self.derived_fields = frozenset(derived | (set() if chose_device else {"use_cpu"})) - self._kept_on_record

    def _translate(self) -> None:
        """Fill in what Trainer reads, from the shared fields or by default; but for the sizes of batches."""
        precision = natural_precision() if self.precision == "auto" else self.precision
        self.bf16 = precision == "bf16" if precision else bool(self.bf16)
        if precision == "bf16" and not torch.accelerator.is_available():
            self.use_cpu = True  # Trainer refuses bf16 on a CPU that was not asked for
        self.fp16 = precision == "fp16" if precision else bool(self.fp16)
        self.max_steps = next((steps for steps in (self.num_train_steps, self.max_steps) if steps is not None), -1)
        if self.schedule:
            self.lr_scheduler_type = SCHEDULER_TYPES[self.schedule]
        self.lr_scheduler_type = self.lr_scheduler_type or "linear"
        self.eval_strategy = self.eval_strategy or strategy_of(self.eval_steps) or "epoch"
        by_evaluation = self.load_best_model_at_end and self.eval_steps and self.save_strategy is None
        if by_evaluation and self.save_steps is None:
            self.save_steps = self.eval_steps  # the best model has to be among the saved ones
        self.save_strategy = self.save_strategy or strategy_of(self.save_steps) or "epoch"
        if self.save_steps is None:
            self.save_steps = TrainingArguments.save_steps

    def _check_reporting(self) -> None:
        """Trainer makes the reports' callbacks when the data are prepared; a missing package is named before that."""
        for name in self.report_to or ():  # a list by now
            try:
                get_reporting_integration_callbacks([name])[0]()
            except (RuntimeError, ImportError) as error:
                raise UserError(f"report_to={name}: {error} (pip install {name}, or leave report_to out)") from error

    def check_engines(self, *, merges: bool = False) -> None:
        """Raises: UserError if the processes cannot be divided as `fsdp_size` asks, or something else is in its way.

        merges: an adapter is to be added to weights, which takes whole ones.
        """
        ProcessLayout.of(self, self.world_size)
        if self.fsdp_size > 1 and merges:
            raise UserError(
                f"merge_adapter needs whole weights, and fsdp_size={self.fsdp_size} cuts them: leave one out"
            )
        if self.fsdp_size > 1 and engines_of_accelerate():
            raise UserError(
                f"fsdp_size={self.fsdp_size} shards the model, and so would accelerate: leave --use_fsdp and "
                "--use_deepspeed out of accelerate launch, or fsdp_size"
            )
        if "ACCELERATE_USE_FSDP" in engines_of_accelerate() and self.device.type == "cpu":
            raise UserError(
                "accelerate's FSDP is for GPUs: on CPUs every process would hold the whole model, without a word; "
                "leave --use_fsdp out of accelerate launch, and set fsdp_size"
            )

    def _cut(self, batch: BatchSizes, *, processes: int) -> None:
        self.per_device_train_batch_size, self.gradient_accumulation_steps = batch.resolve(processes)

    @property
    def _kept_on_record(self) -> frozenset[str]:
        """Defaults that are recorded all the same, as runs of former versions have them on record."""
        return frozenset(name for name in ("eval_strategy", "save_strategy") if getattr(self, name) == "epoch")

    @property
    def may_resume(self) -> bool:
        """Whether a run that `output_dir` holds is resumed."""
        return (self.resume_from_checkpoint or "true").lower() != "false"

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step on this process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def steps_per_epoch(self, num_rows: int) -> int:
        """Optimizer steps of an epoch, counted as Trainer counts them."""
        batches = math.ceil(num_rows / (self.per_device_train_batch_size * self.world_size))
        return max(1, math.ceil(batches / self.gradient_accumulation_steps))

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the run."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * self.steps_per_epoch(num_rows))

    def saves_to_come(self, step: int, total: int) -> int:
        """About how many checkpoints are written after `step`; where the best ones are saved, one at least."""
        given = self.save_steps or 0
        by_strategy = {
            "steps": given if given >= 1 else given * total,
            "epoch": total / max(1.0, self.num_train_epochs),
            "no": 0,
        }
        every = by_strategy.get(getattr(self.save_strategy, "value", self.save_strategy), total)
        return saves_to_come(every, step=step, total=total) if every else 0

    def _wrong_choices(self) -> Iterator[str]:
        if self.optimizer not in (None, *OPTIMIZERS):
            yield f"optimizer={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}, or use optim"
        elif self.optimizer and (self.optim != TrainingArguments.optim or self.optim_args):
            yield f"optimizer={self.optimizer} and optim={self.optim} both name an optimizer; leave one of them out"
        if self.early_stopping_patience and "no" in (self.eval_strategy, strategy_of(self.eval_steps)):
            yield f"early_stopping_patience={self.early_stopping_patience} needs evaluations; set eval_strategy"

    def _wrong_numbers(self) -> Iterator[str]:
        """What Trainer does not check, and torch refuses when the run has begun."""
        yield from too_low(self, dict.fromkeys(("learning_rate", "adam_epsilon", "dataloader_num_workers", "seed"), 0))
        yield from not_below_one(self, ("adam_beta1", "adam_beta2"))
        if not 0 <= self.label_smoothing_factor <= 1:
            yield f"label_smoothing_factor={self.label_smoothing_factor} is not a share; choose between 0 and 1"

    def _contradictions(self) -> Iterator[str]:
        steps = self.num_train_steps
        yield from contradiction(f"num_train_steps={steps}", steps, "max_steps", self.max_steps)
        scheduler = SCHEDULER_TYPES.get(self.schedule or "")
        yield from contradiction(f"schedule={self.schedule}", scheduler, "lr_scheduler_type", self.lr_scheduler_type)
        for name in ("bf16", "fp16"):
            means = None if self.precision in (None, "auto") else self.precision == name
            yield from contradiction(f"precision={self.precision}", means, name, vars(self)[name])
        for kind, every in (("eval", self.eval_steps), ("save", self.save_steps)):
            strategy = vars(self)[f"{kind}_strategy"]
            yield from contradiction(f"{kind}_steps={every}", strategy_of(every), f"{kind}_strategy", strategy)


def choose_best_by(args: TrainingArguments, metric: str, *, among: Collection[str]) -> None:
    """Set the metric used to select the best model, and to find a plateau: `metric`, if the user names no other.

    Raises: UserError if the user's is not `among` the metrics of an evaluation.
    """
    needs = args.load_best_model_at_end, args.save_strategy == "best", args.lr_scheduler_type == "reduce_lr_on_plateau"
    args.metric_for_best_model = args.metric_for_best_model or (metric if any(needs) else None)
    if args.metric_for_best_model and args.metric_for_best_model.removeprefix("eval_") not in among:
        raise UserError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured; choose one of {', '.join(among)}, "
            f"or leave it out for {metric}"
        )
    if args.metric_for_best_model and args.greater_is_better is None:
        args.greater_is_better = not lower_is_better(args.metric_for_best_model)


def resolve_defaults(args: FineTuningArguments, objective: TrainingObjective) -> None:
    """Fill in the defaults that depend on the objective, and check that the settings fit it.

    Raises: UserError for a setting that has no effect or no place there, and as `choose_best_by`.
    """
    choose_best_by(args, objective.scorer.main_metric, among=objective.scorer.metrics)
    if args.label_smoothing_factor and not objective.criterion:
        raise UserError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on {objective.name}, whose loss is "
            "the model's own; leave it out"
        )
    _note_few_steps(args, objective)
    objective.check_micro_batches(args.gradient_accumulation_steps * args.world_size)
    if objective.keeps_order:
        raise UserError("Trainer shuffles the rows; carry_state=True is for recipes/pretrain.py, and so are corpora")


def _note_few_steps(args: FineTuningArguments, objective: TrainingObjective) -> None:
    """Note that the run is short, if it is and no setting says in how many steps it is to end."""
    if "train" not in objective.rows or args.max_steps > 0:
        return
    num_rows = round(len(objective.rows["train"]) / objective.sampled_share)
    if note := few_steps_note(args.total_steps(num_rows), args.num_train_epochs):
        objective.notes.append(note)


def loop_arguments(args: FineTuningArguments) -> LoopArguments:
    """The arguments with which the project's own loop trains as this Trainer does.

    Raises: UserError for an optimizer that the loop does not have.
    """
    if not args.optimizer and not args.optim.startswith("adamw"):
        raise UserError(
            f"find_lr has no {OptimizerNames(args.optim).value}, and another optimizer needs another rate; leave "
            f"optim out and set optimizer to one of {', '.join(OPTIMIZERS)}"
        )
    precision = "bf16" if args.bf16 else "fp32"
    names = "output_dir seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon".split()
    names += [f.name for f in fields(SharedArguments) if f.default is not None]  # the others are translated
    same = {name: getattr(args, name) for name in names if name != "early_stopping_patience"}  # needs eval_steps
    sizes = {
        "batch_size": args.rows_per_step * args.world_size,
        "micro_batch_size": args.per_device_train_batch_size,
    }
    return LoopArguments(optimizer=args.optimizer or "adamw", precision=precision, **same, **sizes)
