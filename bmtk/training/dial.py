"""The dial applied: what follows from a size, the data and the speed of this machine becomes settings of the run.

`derive_shape` comes before the model is made, `derive_training` after it.  A run that is resumed keeps what it derived
when it began, whatever speed would be measured now.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from bmtk.errors import UserError

from .arguments import LoopArguments
from .profiling import Rehearsal, rehearse
from .protocols import BindableData, TrainingObjective
from .run_folder import derived_before, note_derived
from .sharding import ProcessLayout
from .sizes import (
    BYTES_PER_PARAMETER,
    MOST_TOKENS_AT_ONCE,
    MUON_RATES,
    SHAPES,
    TRAINING,
    SizeArguments,
    batch_for,
    context_for,
    depth_for,
    fitted_shape,
    heads_for,
    learning_rate_for,
    shown_count,
    table_rate_for,
    tokens_for,
    tokens_of_steps,
    vocabulary_for,
)
from .updates import Losses

NUM_EVALUATIONS = 10  # of a run, each with a checkpoint
MOST_RESCALED = 4.0  # by which a batch that is given may change the learning rate
TOLERANCE = 0.1  # of a model's parameters around the size


class NamedTask(Protocol):
    """What is read of a task: what its models are made by."""

    @property
    def auto_class(self) -> Any: ...


class DataOfSize(BindableData, Protocol):
    """What is read of the data, before a model is made for them; its settings are written."""

    args: Any

    @property
    def task(self) -> NamedTask: ...

    @property
    def text_bytes(self) -> float | None:
        """Size of the training text; None: not known."""


def choose_vocabulary(dial: SizeArguments, data: Any) -> None:
    """Write into the settings of `data` what vocabulary goes with the size and the text.

    Before the tokenizer is trained, which is when it is first asked for.
    """
    if dial.parameters and "vocab_size" not in dial.given:
        data.args.vocab_size = vocabulary_for(dial.parameters, data.text_bytes)


class PlannedRun(Protocol):
    """What is read of the settings of a run."""

    model_type: str

    @property
    def is_plan(self) -> bool: ...


def derive_shape(dial: SizeArguments, architecture: object, data: DataOfSize, run: PlannedRun, folder: Path) -> None:
    """Fill in the fields of `architecture` that are None: a shape with the parameters of the size, for these data.

    Or that which the run in `folder` has begun with.
    """
    choose_vocabulary(dial, data)
    dial.derived = derived_before(folder) if not run.is_plan and (dial.size or dial.budget) else None
    if dial.derived:
        vars(architecture).update(dial.derived["architecture"])
    elif dial.parameters:
        chosen = {name: value for name, value in vars(architecture).items() if value is not None}
        shape = shape_of(dial.parameters, data, run.model_type, chosen)
        data.notes += _about_shape(dial, _on_meta(data, run.model_type, shape), chosen, data.args.vocab_size)
        dial.derived = {"architecture": {name: value for name, value in shape.items() if name not in chosen}}
        vars(architecture).update(dial.derived["architecture"])


def shape_of(parameters: float, data: DataOfSize, model_type: str, chosen: Mapping[str, object]) -> dict[str, object]:
    """The architecture of a model of `parameters` with the vocabulary of `data` and the fields `chosen`."""

    def fields(width: int, depth: int) -> dict[str, object]:
        heads = {"num_attention_heads": heads_for(width)} if model_type == "bm_transformer" else {}
        return {**SHAPES[model_type], **heads, **chosen, "hidden_size": width, "num_hidden_layers": depth}

    def count(width: int, depth: int) -> int:
        return _on_meta(data, model_type, fields(width, depth)).num_parameters()

    given: dict[str, Any] = {
        "width": chosen.get("hidden_size"),
        "depth": chosen.get("num_hidden_layers"),
        "heads": chosen.get("num_attention_heads"),
    }
    return fields(*fitted_shape(parameters, count, **given))


def _on_meta(data: DataOfSize, model_type: str, shape: Mapping[str, object]) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = data.task.auto_class.from_config(data.new_config(model_type, shape))
    return model


def _about_shape(
    dial: SizeArguments, model: PreTrainedModel, chosen: Mapping[str, object], vocabulary: int
) -> list[str]:
    """What of a model follows from the size, by which formulas, and what is given."""
    config, count, parameters = model.config, model.num_parameters(), dial.parameters or 0.0
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    sizes = ", ".join(f"{name}={getattr(config, name)}" for name in names if hasattr(config, name))
    share, off = 1 - num_trunk_parameters(model) / count, count / parameters - 1
    formulas = {
        "vocab_size": f"{vocabulary} = 1024 (N / 1M)^0.6",
        "context_length": f"{context_for(parameters)} = 256 (N / 1M)^0.3",
    }
    if vocabulary < vocabulary_for(parameters):
        formulas["vocab_size"] += f", N no more than a {BYTES_PER_PARAMETER}th of the bytes of the text"
    given = {name: dial.given[name] for name in formulas if name in dial.given} | dict(chosen)
    tokens = [f"{name}={value}, a power of two" for name, value in formulas.items() if name not in given]
    layers = f"layers about {depth_for(config.hidden_size):.1f} = 4 (width / 128)^0.6"
    return [
        f"size {dial.size}: {'; '.join([*tokens, layers])}",
        f"shape: {config.model_type} with {sizes}: {count:,} parameters, {off:+.1%} beside the size, {share:.0%} of "
        f"them for {config.vocab_size:,} tokens",
        *_by_hand(given),
        *([f"the size is missed by more than {TOLERANCE:.0%}, because of these"] if abs(off) > TOLERANCE else []),
    ]


def num_trunk_parameters(model: PreTrainedModel) -> int:
    """Parameters without lookup tables and without the output head."""
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    apart = tables if head is None else tables | {head.weight}
    return sum(p.numel() for p in model.parameters() if p not in apart)


def _named(values: Mapping[str, object]) -> str:
    shown = {k: f"{value:.3g}" if isinstance(value, float) else value for k, value in values.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _by_hand(values: Mapping[str, object]) -> list[str]:
    return [f"given by hand, and kept: {_named(values)}"] if values else []


def derive_training(
    dial: SizeArguments,
    args: LoopArguments,
    objective: TrainingObjective,
    model: PreTrainedModel,
    accelerator: Accelerator,
    *,
    is_plan: bool,
) -> None:
    """Write into `args` what follows from size and budget, note how, and keep it in the run's folder.

    Raises: UserError if the budget has no room for a step, or cannot be measured.
    """
    if not (dial.size or dial.budget):
        return
    derived = dial.derived or {"architecture": {}}
    if "training" in derived:
        objective.notes.append(f"derived when this run began, and kept: {_named(derived['training'])}")
    else:
        derived["training"], notes = TrainingDerivation(dial, args, objective, model, accelerator).derive()
        objective.notes += notes
        if accelerator.is_main_process and not is_plan:
            note_derived(Path(args.output_dir), derived)
    # What may differ in a resumed run, such as save_steps, may be given to it.
    given = _given_names(dial, args)
    vars(args).update({name: value for name, value in derived["training"].items() if name not in given})
    dial.budget = None  # it has become num_train_steps, which the record of the run shows


def _given_names(dial: SizeArguments, args: LoopArguments) -> set[str]:
    """The settings that file or command line have; num_train_steps=-1 leaves the length open."""
    is_open = args.num_train_steps == -1
    return {name for name in dial.given if not (is_open and name == "num_train_steps")}


class TrainingDerivation:
    """Settings of training that follow from a size and a budget, and how, in sentences."""

    def __init__(
        self,
        dial: SizeArguments,
        args: LoopArguments,
        objective: TrainingObjective,
        model: PreTrainedModel,
        accelerator: Accelerator,
    ):
        self.dial, self.args, self.objective = dial, args, objective
        self.model, self.accelerator = model, accelerator
        self.layout = ProcessLayout.of(args, accelerator.num_processes)
        self.given = _given_names(dial, args)
        self.row = objective.units_per_row("train")  # tokens
        self.in_data = len(objective.rows["train"]) * self.row / objective.sampled_share

    def derive(self) -> tuple[dict[str, Any], list[str]]:
        """The settings and the sentences."""
        if self.dial.size:
            tokens, why = self._tokens()
            settings, notes = self.for_tokens(tokens), [f"tokens: {shown_count(tokens)}, {why}"]
        else:
            steps_per_epoch = self.in_data / self.row / self.args.batch_size
            settings, notes = {"num_train_steps": self.args.total_steps(steps_per_epoch)}, []
        if self.dial.seconds:
            settings, sentence = self._within(self.dial.seconds, settings)
            notes.append(sentence)
        return settings, [*notes, *self._about(settings)]

    def _tokens(self) -> tuple[float, str]:
        if steps := self._given("num_train_steps"):
            rows = self._given("batch_size")
            return steps * rows * self.row if rows else tokens_of_steps(steps), f"num_train_steps={steps} by hand"
        if "num_train_epochs" in self.given:
            epochs = self.args.num_train_epochs
            return epochs * self.in_data, f"num_train_epochs={epochs:g} by hand"
        return tokens_for(self.model.num_parameters(), self.in_data)

    def _given(self, name: str) -> int:
        """The value of a setting that is given; 0 if it is not."""
        return int(vars(self.args)[name]) if name in self.given else 0

    def for_tokens(self, tokens: float) -> dict[str, Any]:
        """What follows from a number of tokens to train on, without what is given."""
        best, processes = batch_for(tokens), self.layout.num_shares
        rows = self._given("batch_size") or max(1, round(best / self.row / processes)) * processes
        batch = rows * self.row
        # Adam's best rate grows with the root of the batch (Malladi et al. 2022, arXiv:2205.10287).
        of_batch = math.sqrt(batch / best) if "batch_size" in self.given else 1.0
        rescaled = min(max(of_batch, 1 / MOST_RESCALED), MOST_RESCALED)
        is_cut = batch / processes > MOST_TOKENS_AT_ONCE
        settings = {
            **TRAINING,
            "batch_size": rows,
            "micro_batch_size": max(1, int(MOST_TOKENS_AT_ONCE / self.row)) if is_cut else 0,
            **{name: float(f"{rate * rescaled:.3g}") for name, rate in self._rates(tokens).items()},
            **_length(self._given("num_train_steps") or max(1, round(tokens / batch))),
        }
        return self._without_given(settings)

    @property
    def optimizer(self) -> str:
        return self.args.optimizer if "optimizer" in self.given else str(TRAINING["optimizer"])

    def _rates(self, tokens: float) -> dict[str, float]:
        """Learning rates for the batch that goes with `tokens`; none for SGD, which has no such law."""
        if self.optimizer == "adamw":
            return {"learning_rate": learning_rate_for(num_trunk_parameters(self.model), tokens)}
        if self.optimizer == "sgd":
            return {}
        config = self.model.config
        muon = MUON_RATES.get(config.model_type, LoopArguments.muon_learning_rate)
        return {"muon_learning_rate": muon, "learning_rate": table_rate_for(config.hidden_size)}

    def _without_given(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name not in self.given}

    def _within(self, seconds: float, settings: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The settings with as many steps as fit in `seconds`; the learning rate decays over these."""
        wanted, found = settings["num_train_steps"], self._rehearse(settings)
        if self.dial.size and found.seconds * wanted > seconds:
            # Fewer tokens want a smaller batch, which takes another time.
            batch = settings.get("batch_size", self.args.batch_size) * self.row
            settings = self.for_tokens(seconds / found.seconds * batch)
            found = self._rehearse(settings)
        steps = min(settings["num_train_steps"], int(seconds / found.seconds))
        if steps < 1:
            raise UserError(
                f"budget={self.dial.budget} has no room for a step, which takes {found.seconds:.2g} s here; give more "
                "time, or a smaller size"
            )
        length = _length(steps) if self.dial.size else {}
        return {**settings, **self._without_given({**length}), "num_train_steps": steps}, (
            f"budget {self.dial.budget}: {found.seconds * 1e3:.3g} ms a step, the mean of {found.num_steps} measured "
            f"now: {steps:,} of {wanted:,} steps, {steps * found.seconds:.3g} s of training; evaluations come on top"
        )

    def _rehearse(self, settings: Mapping[str, Any]) -> Rehearsal:
        if self.layout.is_sharded:
            raise UserError(
                f"budget={self.dial.budget} is measured with a whole model on every process, which fsdp_size and "
                "tp_size are to avoid; set num_train_steps instead"
            )
        args = replace(self.args, **{**settings, "num_train_steps": -1})
        batches = self.objective.train_batches(**args.batching, **self.layout.share(self.accelerator.process_index))
        return rehearse(self.model, batches, self.accelerator, Losses.of(self.objective), args)

    def _about(self, settings: Mapping[str, Any]) -> list[str]:
        """The settings with their formulas, and what is given instead."""
        formulas = {
            "batch_size": " = 0.58 tokens^0.571, in rows",
            "learning_rate": " = 0.01 (128 / width)^0.5"
            if self.optimizer == "muon"
            else " = 1.79 N^-0.713 tokens^0.307, N without vocabulary",
        }
        if not self.dial.size:
            return []
        parts = [_named({name: value}) + formulas.get(name, "") for name, value in settings.items()]
        names = (*settings, *TRAINING, *formulas, "num_train_steps", "num_train_epochs", "micro_batch_size")
        given = {name: vars(self.args)[name] for name in dict.fromkeys(names) if name in self.given}
        return [f"training: {'; '.join(parts)}", *_by_hand(given)]


def _length(steps: int) -> dict[str, int]:
    """Settings of a run of `steps`."""
    every = math.ceil(steps / NUM_EVALUATIONS)
    return {"num_train_steps": steps, "eval_steps": every, "save_steps": every}
