"""The settings of one training run that the loop itself reads.

The fields are simple types, so `transformers.HfArgumentParser` and a flat YAML file can both fill them.  Every field
is checked when the object is made, and one message names all problems.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bmtk.errors import UserError

OPTIMIZERS = ("adamw", "muon", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "wsd")
AUTO = -1  # micro_batch_size: found by trial; bmtk/arguments.py reads the word auto as this
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
NONFINITE = ("stop", "skip")

# Keys of LoopArguments that may change when a run is resumed: they change how it is watched, stored or laid out in
# memory, not what is learned.
FREE_KEYS = frozenset(
    "output_dir overwrite_output_dir logging_steps eval_steps save_steps save_total_limit "
    "micro_batch_size gradient_checkpointing torch_compile nonfinite spike_sigma rollback_after max_minutes "
    "fsdp_size dp_replicate_size tp_size save_in_background timeout_minutes".split()
)


def _setting(default: object, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class SharedArguments:
    """What both training recipes call by the same names.

    None leaves a choice to the subclass: LoopArguments has defaults of its own, FineTuningArguments those of Trainer,
    which are named at the end of the help texts.
    """

    num_train_steps: int | None = _setting(None, "optimizer steps; -1: as many as num_train_epochs need; default: -1")
    batch_size: int | None = _setting(
        None, "rows per optimizer step, over all processes and micro-batches together; default: 8 per process"
    )
    micro_batch_size: int | None = _setting(
        None,
        "rows per process and forward pass; 0: the share of the process; auto: as many as fit into memory; halved "
        "whenever memory is too little; default: 0",
    )

    muon_learning_rate: float = _setting(0.02, "peak learning rate of Muon")
    muon_momentum: float = _setting(
        0.95, "share of Muon's last mean of gradients in its next one (Nesterov); a few hundred steps want 0.85"
    )
    sgd_momentum: float = _setting(0.9, "share of the last update in SGD's next one (Nesterov); 0: none")
    layer_lr_decay: float = _setting(
        1.0,
        "a layer's learning rate is that of the one above it times this, the head's is the whole one; 1: all alike",
    )
    unfreeze_epochs: float = _setting(
        0.0, "epochs in which the head alone is trained, before each further layer from the top joins; 0: train all"
    )
    l1_penalty: float = _setting(
        0.0, "factor of the sum of absolute values of decayed matrices, added to the loss but not to its logs; 0: none"
    )
    ema_decay: float = _setting(
        0.0, "decay (0.999) of an exponential moving average of the weights, which is evaluated and saved; 0: none"
    )

    schedule: str | None = _setting(
        None, "learning rate over the run: constant, linear, cosine or wsd; default: linear"
    )
    decay_fraction: float = _setting(0.2, "last part of the run in which wsd decays, as a fraction of all steps")

    eval_steps: float | None = _setting(
        None, "steps between two evaluations; 0: at the end only; default: one per epoch"
    )
    save_steps: float | None = _setting(
        None, "steps between two checkpoints; 0: at the end only; default: one per epoch"
    )
    early_stopping_patience: int = _setting(
        0, "end the run after this many evaluations without a better main metric, and keep the best model; 0: never"
    )

    fsdp_size: int = _setting(
        1, "processes over which weights, gradients and optimizer state are spread (FSDP2); 1: each holds all of them"
    )
    dp_replicate_size: int = _setting(
        0, "copies of the model that are sharded so, best one on each machine (HSDP); 0: as many as the processes make"
    )

    nonfinite: str = _setting(
        "stop", "a step that is not finite is never applied: stop, with the weights before it saved, or skip it"
    )
    spike_sigma: float = _setting(
        6.0,
        "a step is skipped if its loss and its gradient norm are both this many robust standard deviations above the "
        "median of the last 128 steps; 0: never",
    )
    rollback_after: int = _setting(
        20,
        "skipped steps in a row after which the run goes back to its last checkpoint, and leaves their data out",
    )

    max_minutes: float | None = _setting(
        None,
        "stop after this time, with a checkpoint that the same command resumes (exit code 124); default: never",
    )

    precision: str | None = _setting(
        None,
        "fp32, bf16 or fp16 autocast; auto: bf16 on GPUs and CPUs that have instructions for it, else fp32; "
        "default: that of accelerate launch",
    )

    def wrong_settings(self) -> Iterator[str]:
        """What is wrong with the values, in sentences."""
        yield from self._wrong_shared_choices()
        least_rows = AUTO if self.micro_batch_size == AUTO else 0
        yield from too_low(self, {"batch_size": 1, "micro_batch_size": least_rows, "eval_steps": 0, "save_steps": 0})
        yield from too_low(self, {"spike_sigma": 0, "rollback_after": 1, "fsdp_size": 1, "dp_replicate_size": 0})
        if self.num_train_steps is not None and self.num_train_steps < 1 and self.num_train_steps != -1:
            yield f"num_train_steps={self.num_train_steps} is out of range; give at least 1, or -1 for whole epochs"
        names = ("muon_learning_rate", "unfreeze_epochs", "l1_penalty", "early_stopping_patience", "decay_fraction")
        yield from too_low(self, dict.fromkeys(names, 0))
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            yield f"max_minutes={self.max_minutes} is out of range; give a number above 0"
        if self.decay_fraction > 1:
            yield f"decay_fraction={self.decay_fraction} is a fraction; give a number from 0 to 1"
        if not 0 < self.layer_lr_decay <= 1:
            yield f"layer_lr_decay={self.layer_lr_decay} is out of range; give a number above 0, and at most 1"
        yield from not_below_one(self, ("muon_momentum", "sgd_momentum", "ema_decay"))

    def _wrong_shared_choices(self) -> Iterator[str]:
        choices = {"schedule": SCHEDULES, "precision": PRECISIONS, "nonfinite": NONFINITE}
        for name, allowed in choices.items():
            value = vars(self)[name]
            if value is not None and value not in allowed:
                yield f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}"


def too_low(args: object, at_least: Mapping[str, int]) -> Iterator[str]:
    for name, lowest in at_least.items():
        value = vars(args)[name]
        if value is not None and not lowest <= value < math.inf:
            yield f"{name}={value} is out of range; give a number of at least {lowest}"


def not_below_one(args: object, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        if not 0 <= vars(args)[name] < 1:
            yield f"{name}={vars(args)[name]} is out of range; give a number of at least 0 and below 1"


def check(problems: Iterable[str]) -> None:
    """Raises: UserError that names all `problems`, if there are any."""
    if problems := list(problems):
        raise UserError("the training arguments do not fit:\n  " + "\n  ".join(problems))


def _shared(name: str, default: object) -> Any:
    """A field of SharedArguments with a default of the loop's own in place of Trainer's."""
    text = SharedArguments.__dataclass_fields__[name].metadata["help"]
    return field(default=default, metadata={"help": text.split("; default: ")[0]})


@dataclass
class LoopArguments(SharedArguments):
    """The settings of the project's own loop: how long, how fast, how often, and where to."""

    _argument_group_name = "training"

    output_dir: str = _setting("outputs/run", "folder of the run: checkpoints, history.jsonl and the final model")
    overwrite_output_dir: bool = _setting(False, "delete the run that output_dir holds, and start anew")
    seed: int = _setting(42, "seed of initial weights, data order and dropout")

    num_train_steps: int = _shared("num_train_steps", -1)
    num_train_epochs: float = _setting(1.0, "passes over the training rows; read when num_train_steps is -1")
    batch_size: int = _shared("batch_size", 32)
    micro_batch_size: int = _shared("micro_batch_size", 0)

    optimizer: str = _setting("adamw", "adamw, sgd, or muon (hidden matrices and filters; AdamW for the rest)")
    learning_rate: float = _setting(1e-3, "peak learning rate of AdamW or SGD")
    weight_decay: float = _setting(0.1, "decoupled weight decay of matrices, times the learning rate at each step")
    adam_beta1: float = _setting(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = _setting(0.95, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = _setting(1e-8, "added to the root of that mean, which AdamW divides by")
    max_grad_norm: float = _setting(
        1.0, "gradients longer than this (L2 norm of all of them) are scaled down; 0: never"
    )

    schedule: str = _shared("schedule", "cosine")
    warmup_steps: float = _setting(0.02, "steps of linear warm-up; below 1: that fraction of the run")
    min_lr_ratio: float = _setting(0.0, "learning rate at the end of the decay, as a fraction of the peak")

    logging_steps: int = _setting(10, "steps between two lines of history.jsonl")
    eval_steps: int = _shared("eval_steps", 0)
    save_steps: int = _shared("save_steps", 0)
    save_total_limit: int = _setting(2, "newest checkpoints to keep; 0: all")
    save_in_background: bool = _setting(
        True, "go on training while a checkpoint is written, from a copy of the state, if there is memory for it"
    )

    precision: str = _shared("precision", "auto")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass: less memory, slower")
    torch_compile: bool = _setting(False, "compile the model with torch.compile before the first step")
    tp_size: int = _setting(
        1,
        "processes over which each matrix is cut (tensor parallelism), where one device cannot hold a layer",
    )
    timeout_minutes: float = _setting(30.0, "how long a process waits for another one before the run ends")

    def __post_init__(self) -> None:
        check([*self._wrong_choices(), *self._wrong_numbers(), *self.wrong_settings()])

    def _wrong_choices(self) -> Iterator[str]:
        if self.optimizer not in OPTIMIZERS:
            yield f"optimizer={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}"

    def _wrong_numbers(self) -> Iterator[str]:
        at_least = {"logging_steps": 1, "save_total_limit": 0, "learning_rate": 0, "weight_decay": 0}
        at_least |= {"adam_epsilon": 0, "max_grad_norm": 0, "warmup_steps": 0, "min_lr_ratio": 0, "seed": 0}
        at_least |= {"tp_size": 1}
        yield from too_low(self, at_least)
        yield from not_below_one(self, ("adam_beta1", "adam_beta2"))
        if not 0 < self.timeout_minutes < math.inf:
            yield f"timeout_minutes={self.timeout_minutes} is out of range; give a number above 0"
        if self.min_lr_ratio > 1:
            yield f"min_lr_ratio={self.min_lr_ratio} is a fraction; give a number from 0 to 1"
        if self.early_stopping_patience and not self.eval_steps:
            yield f"early_stopping_patience={self.early_stopping_patience} needs evaluations; set eval_steps"
        if self.num_train_steps == -1 and not 0 < self.num_train_epochs < math.inf:
            yield f"num_train_epochs={self.num_train_epochs} is out of range; give a number above 0"

    @property
    def batching(self) -> dict[str, int]:
        """Which rows make a step, and how they are cut: arguments of `TrainingObjective.train_batches`."""
        return {"batch_size": self.batch_size, "micro_batch_size": max(0, self.micro_batch_size), "seed": self.seed}

    def total_steps(self, steps_per_epoch: int | float) -> int:
        """Optimizer steps of the whole run, for a data set that lasts `steps_per_epoch` steps."""
        if self.num_train_steps != -1:
            return self.num_train_steps
        return max(1, math.ceil(self.num_train_epochs * steps_per_epoch))

    def warmup(self, total_steps: int) -> int:
        """Optimizer steps of warm-up in a run of `total_steps`."""
        return round(self.warmup_steps * total_steps) if self.warmup_steps < 1 else int(self.warmup_steps)
