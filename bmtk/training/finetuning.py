"""Fine-tuning: Trainer with this project's defaults, and pretrained weights under a new head."""

import json
import logging
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler, DataLoader, Subset
from transformers import AutoConfig, PreTrainedModel, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .adapters import ADAPTER_CONFIG, load_adapter
from .arguments import OPTIMIZERS, LoopArguments, SharedArguments, check
from .averaging import AVERAGES, WeightAverage
from .batch_sampler import EvenBatchSampler
from .callbacks import AverageWeights, ProgressBar, SetEpoch, StopEarly
from .evaluation import Results, lower_is_better, measure, predict_all
from .gradients import gradient_rules
from .layers import decay_rates, depths
from .optimizers import build_optimizer
from .quantization import quantization, quantize_subclasses
from .run_folder import CHECKPOINTS
from .updates import LossSum

logger = logging.getLogger(__name__)

# Keys that may change when a fine-tuning run is resumed: they change how it is watched or stored, not what is learned.
FREE_KEYS = frozenset(
    "output_dir overwrite_output_dir resume_from_checkpoint logging_steps save_total_limit report_to disable_tqdm "
    "run_name per_device_eval_batch_size dataloader_num_workers dataloader_pin_memory merge_adapter".split()
)


def _settled(default):
    """A field of TrainingArguments that no command line may set."""
    return field(default=default, init=False)


@dataclass
class FineTuningArguments(SharedArguments, TrainingArguments):
    """transformers.TrainingArguments; settled here is what recipes do themselves, and what would hide a broken run."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    output_dir: str = field(default="outputs/finetune", metadata={"help": "folder of the run and of the final model"})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "delete the run that output_dir holds, and start anew"}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(
        default="epoch", metadata={"help": "when to write a checkpoint: no, steps, epoch or best"}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "rows per device in evaluations"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of history.jsonl"})
    save_total_limit: int | None = field(default=2, metadata={"help": "newest checkpoints to keep"})
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

    logging_nan_inf_filter: bool = _settled(False)  # True logs a NaN loss as 0.0
    # A token would be pickled into training_args.bin; publishing is done by bmtk.hub, from the login or HF_TOKEN.
    hub_token: str | None = _settled(None)
    push_to_hub: bool = _settled(False)
    hub_model_id: str | None = _settled(None)
    hub_strategy: str = _settled("every_save")
    hub_private_repo: bool | None = _settled(None)
    hub_always_push: bool = _settled(False)
    hub_revision: str | None = _settled(None)
    save_only_model: bool = _settled(False)  # True resumes with a new optimizer and schedule, and says nothing
    include_num_input_tokens_seen: str = _settled("no")
    remove_unused_columns: bool = _settled(False)
    batch_eval_metrics: bool = _settled(False)
    eval_do_concat_batches: bool = _settled(True)
    label_names: list[str] = field(default_factory=lambda: ["labels"], init=False)  # columns, as Trainer calls them
    do_train: bool = _settled(False)  # these three are read by Hugging Face's example scripts only
    do_eval: bool = _settled(False)
    do_predict: bool = _settled(False)

    def __post_init__(self):
        check([*self._wrong_choices(), *self.wrong_settings()])
        self.load_best_model_at_end |= self.early_stopping_patience > 0
        given = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        self.metric_for_best_model, self.greater_is_better = given  # not the loss: `choose_best_by` knows the task

    @property
    def may_resume(self) -> bool:
        return (self.resume_from_checkpoint or "true").lower() != "false"

    def _wrong_choices(self):
        if self.optimizer not in (None, *OPTIMIZERS):
            yield f"optimizer={self.optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}, or use optim"
        elif self.optimizer and (self.optim != TrainingArguments.optim or self.optim_args):
            yield f"optimizer={self.optimizer} and optim={self.optim} both name an optimizer; leave one of them out"
        if self.early_stopping_patience and self.eval_strategy == "no":
            yield f"early_stopping_patience={self.early_stopping_patience} needs evaluations; set eval_strategy"


def load_for_task(
    auto_class, name: str, config, *, quantize: str | None = None, **loading: object
) -> tuple[PreTrainedModel, list[str]]:
    """Weights of `name` in float32 under the head of `auto_class`; with what was not found there, in sentences.

    quantize: "4bit" or "8bit", for the linear layers of the trunk.
    Raises: ValueError if the model has no such head, or its trunk is not the one that `config` describes.
    """
    if type(config) not in auto_class._model_mapping and auto_class.__name__ not in getattr(config, "auto_map", {}):
        raise ValueError(f"a {config.model_type} model has no head for this task (no {auto_class.__name__} knows it)")
    if quantize:
        with torch.device("meta"):
            skeleton = auto_class.from_config(config, **loading)
        loading["quantization_config"] = quantization(quantize, skeleton)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of missing weights is said in one line here
    try:
        model, info = auto_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **loading,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    if quantize:
        quantize_subclasses(model, loading["quantization_config"])
    return model, _weight_notes(model, name, info)


def _weight_notes(model: PreTrainedModel, name: str, info: dict) -> list[str]:
    trunk = f"{model.base_model_prefix}."
    wrong = sorted((key, tuple(there), tuple(here)) for key, there, here in info["mismatched_keys"])
    if foreign := [f"{key} {there} there, {here} here" for key, there, here in wrong if key.startswith(trunk)]:
        raise ValueError(
            f"the weights of {name} do not have the shapes that the configuration asks for: {'; '.join(foreign[:3])}; "
            "leave the architecture of a pretrained model as it is"
        )
    missing = sorted(info["missing_keys"])
    if len(missing) == len(model.state_dict()):
        raise ValueError(f"none of the weights in {name} belongs to a {type(model).__name__}; is it another model?")
    notes = []
    if missing:
        notes.append(f"NEWLY INITIALISED, to be learned from these data: {', '.join(missing)} (not in {name})")
    if wrong:
        shapes = "; ".join(f"{key} was {there}, is {here}" for key, there, here in wrong)
        notes.append(f"NEWLY INITIALISED, because {name} was trained for another number of labels: {shapes}")
    return notes


def read_config(model: str, chosen: dict[str, object], **loading: object) -> tuple[object, list[str]]:
    """The configuration of a saved model, with what `chosen` says of dropout and head; the rest is left, and said.

    Raises: ValueError if `model` is no whole model, or nowhere to be found.
    """
    folder = Path(model)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"model={model!r} holds an adapter, not a whole model; save one with merge_adapter, or start from its base"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model={model!r} is a folder without config.json; give one that save_pretrained has filled")
    try:
        config = AutoConfig.from_pretrained(model, **loading)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"model={model!r} is no folder here, and as a Hub id it cannot be loaded: {reason}"
        ) from error
    for name in chosen:
        if may_change(name) and hasattr(config, name):
            setattr(config, name, chosen[name])
    others = [name for name in chosen if getattr(config, name, None) != chosen[name]]
    return config, [f"{model} keeps its own architecture: {', '.join(others)} not applied"] if others else []


def may_change(name: str) -> bool:
    """Whether a field of a pretrained model's configuration may be set anew: it is of dropout, or of the head."""
    return "drop" in name or name.startswith("classifier_")


def starting_model(run, task, chosen: dict[str, object], *, quantize: str | None = None) -> PreTrainedModel:
    """The model that training starts from: `run.model` under the task's head, or a new `run.model_type`.

    `chosen` are fields of its configuration, `quantize` is that of `load_for_task`.  What was decided on the way is
    said in `task.notes`.
    """
    if run.model:
        config, notes = read_config(run.model, chosen, **run.loading)
        task.configure(config)
        model, more = load_for_task(task.auto_class, run.model, config, quantize=quantize, **run.loading)
        task.notes += notes + more
    else:
        config = task.new_config(run.model_type, chosen, preset=run.preset_model)
        task.configure(config)
        model = task.auto_class.from_config(config)
    task.prepare_to_save(model)
    return model


class TrainedModel:
    """A finished model: a whole one, or an adapter whose base is where `adapter_config.json` says.

    The labels of an adapter, how its head pools, and how its base was quantised, only its run.json can tell.
    Raises: ValueError if it, or its base, cannot be found.
    """

    def __init__(self, name: str, **loading: object):
        self.name, self.loading, self.labels = name, loading, []
        self.base, self.quantize, head = name, None, {}
        if (Path(name) / ADAPTER_CONFIG).is_file():
            self.base = json.loads((Path(name) / ADAPTER_CONFIG).read_text(encoding="utf-8"))[
                "base_model_name_or_path"
            ]
            facts = Path(name) / "run.json"
            run = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
            self.labels = run.get("data", {}).get("labels", [])
            settings = run.get("config", {})
            self.quantize = settings.get("quantize")
            head = {k: value for k, value in settings.items() if k.startswith("classifier_") and value is not None}
        self.config, _ = read_config(self.base, head, **loading)

    def load(self, auto_class) -> PreTrainedModel | PeftModel:
        """The model with its head.  Raises: ValueError if it was saved without one."""
        model, notes = load_for_task(auto_class, self.base, self.config, quantize=self.quantize, **self.loading)
        if self.base != self.name:
            return load_adapter(model, self.name)
        if notes:
            raise ValueError(f"{self.name} was not trained for this task: {'; '.join(notes)}")
        return model


def checkpoint_to_resume(directory: str | Path, wanted: str | None) -> str | None:
    """The checkpoint folder `wanted`, or the newest whole one of the run; None to start from the beginning ("false").

    Trainer writes `trainer_state.json` last: a folder without a readable one was cut short and is passed over.
    Raises: ValueError if `wanted` is not a whole checkpoint.
    """
    said = (wanted or "true").lower()
    if said == "false":
        return None
    if said != "true":
        if not _is_whole(Path(wanted)):
            raise ValueError(
                f"resume_from_checkpoint={wanted!r} is not a folder with a whole checkpoint of Trainer; name one, or "
                "say true (the newest of output_dir) or false (start anew)"
            )
        return wanted
    folders = [path for path in (Path(directory) / CHECKPOINTS).glob("checkpoint-*") if path.name[11:].isdecimal()]
    folders.sort(key=lambda path: int(path.name[11:]), reverse=True)
    whole = [path for path in folders if _is_whole(path)]
    for path in folders[: folders.index(whole[0]) if whole else None]:
        logger.warning("%s was not written to its end and is passed over", path)
    return str(whole[0]) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


class TaskTrainer(Trainer):
    """Trainer whose loss and metrics are exact: it asks the task, where Trainer averages averages.

    - A loss is a sum over the items of the whole optimizer step divided by their number, also for models that accept
      `num_items_in_batch` and drop it, and for labels that are not one tensor.
    - The steps of several processes are those of one with as large a batch, also where the rows of an epoch run out.
    - An evaluation sees every row once on any number of processes, keeps a prediction for each instead of its logits,
      and scores all of them at once; Trainer's loss is a mean of batch means in which rows that fill up the last
      batches count twice.
    - Where rows have a `length`, those of an evaluation are batched longest first; predictions are in the rows' order.
    - `optimizer` names one of the project's own, with its groups of parameters.
    - Layers are unfrozen, and an L1 penalty added, as in the project's own loop.
    - An average of the weights (`ema_decay`) is what is evaluated, chosen from and left in the model at the end.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, model, args: TrainingArguments, task, *, callbacks: Sequence = ()):
        super().__init__(
            model,
            args,
            train_dataset=task.training_rows(),
            eval_dataset=task.preview_rows(),
            processing_class=task.processor,
            data_collator=task.collator(),
            callbacks=list(callbacks),
        )
        if hasattr(self.train_dataset, "set_epoch"):
            self.add_callback(SetEpoch(self.train_dataset))
        self.task = task
        steps = steps_per_epoch(args, len(self.train_dataset))
        total = total_steps(args, len(self.train_dataset))
        self.gradient_rules = gradient_rules(model, args, steps_per_epoch=steps, total=total)
        self.average: WeightAverage | None = None
        if args.ema_decay:
            self.add_callback(AverageWeights(self))
        if args.early_stopping_patience:
            self.add_callback(StopEarly(args.early_stopping_patience))
        self.loss = LossSum(model, model, args.device, criterion=criterion_of(task, args), inputs_of=task.inputs_of)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        counts = [int(self.task.num_items(batch)) for batch in batch_samples]
        units = [int(self.task.num_units(batch)) for batch in batch_samples]
        totals = torch.tensor([sum(counts), sum(units)], device=device)
        totals = self.accelerator.reduce(totals) if self.args.world_size > 1 else totals
        self.state.num_input_tokens_seen += int(totals[1])  # the one counter of units that a checkpoint keeps
        return totals[0].clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The batch's summed loss over the items of the step; times the processes, which average their gradients."""
        assert not return_outputs
        self.loss.model = model  # wrapped for several devices
        return self.loss(inputs, int(self.task.num_items(inputs)), num_items_in_batch) * self.args.world_size

    def _run_epoch(self, **kwargs) -> None:
        """Nothing, where a run goes on that had stopped early."""
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of a micro-batch; after the step's last one, `gradient_rules`, before the clipping."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.gradient_rules and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.gradient_rules(self.state.global_step, scale=scaler.get_scale() if scaler else 1.0)
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.args.optimizer and self.optimizer is None:
            self.optimizer = build_optimizer(self.model, self.args)
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.layer_lr_decay != 1:
            depth = depths(self.model, asked_by=f"layer_lr_decay={self.args.layer_lr_decay}")
            decay_rates(optimizer, depth, self.args.layer_lr_decay)
        if self.args.ema_decay:
            names = {parameter: name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            self.average = WeightAverage(names, self.args.ema_decay)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Before trainer_state.json, with which a checkpoint is whole."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average and self.args.should_save:
            save_file(self.average.state_dict(), Path(output_dir) / AVERAGES)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # a torch optimizer's state tells it, a NamedOptimizer's does not
        if self.average:
            self.average.load_state_dict(load_file(Path(checkpoint) / AVERAGES))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average:
            self.average.load_state_dict(load_file(Path(self.state.best_model_checkpoint) / AVERAGES))

    def get_train_dataloader(self) -> DataLoader:
        """With every row of an epoch once, on any number of processes."""
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and type(batches := shard.batch_sampler) is BatchSampler:
            settings = batches.sampler, batches.batch_size, batches.drop_last
            shard.batch_sampler, shard.even_batches = (
                EvenBatchSampler(*settings, num_processes=shard.num_processes),
                False,
            )
        return loader

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """This process's share of the rows, in the order of `_reading_order`."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world, order = self.args.process_index, self.args.world_size, self._reading_order(rows)
        share = Subset(rows, order[len(rows) * rank // world : len(rows) * (rank + 1) // world])
        workers = self.args.dataloader_num_workers
        return DataLoader(share, self.args.eval_batch_size, collate_fn=self.data_collator, num_workers=workers)

    get_test_dataloader = get_eval_dataloader

    def _reading_order(self, rows) -> list[int]:
        """The longest rows first, so that a batch holds little padding; in their own order if no lengths are known."""
        if self.args.length_column_name not in getattr(rows, "column_names", ()):
            return list(range(len(rows)))
        return np.argsort(-np.asarray(rows[self.args.length_column_name]), kind="stable").tolist()

    def predictions(self, dataloader: DataLoader, description: str, *, preview: bool = False) -> list:
        """A prediction for each row of the loader's split, in the rows' order, from all processes."""
        predictions = predict_all(
            self.model.to(self.args.device),
            dataloader,
            self.accelerator,
            self.task.preview if preview else self.task.predict,
            description=description,
            num_batches=len(dataloader),
            show_progress=not self.args.disable_tqdm,
        )
        return [predictions[place] for place in np.argsort(self._reading_order(dataloader.dataset.dataset))]

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs) -> EvalLoopOutput:
        with self.average.applied() if self.average else nullcontext():
            predictions = self.predictions(dataloader, description, preview=metric_key_prefix == "eval")
        rows = dataloader.dataset.dataset
        metrics = self.task.score(predictions, rows)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=predictions, label_ids=None, metrics=named, num_samples=len(rows))


def choose_best_by(args: TrainingArguments, metric: str, *, among: Collection[str]) -> None:
    """Let what asks for a best model, or for a plateau, go by `metric_for_best_model`, or else by `metric`.

    Raises: ValueError if that is not `among` the metrics of an evaluation.
    """
    asks = args.load_best_model_at_end, args.save_strategy == "best", args.lr_scheduler_type == "reduce_lr_on_plateau"
    args.metric_for_best_model = args.metric_for_best_model or (metric if any(asks) else None)
    if args.metric_for_best_model and args.metric_for_best_model.removeprefix("eval_") not in among:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not measured; choose one of {', '.join(among)}, "
            f"or leave it out for {metric}"
        )
    if args.metric_for_best_model and args.greater_is_better is None:
        args.greater_is_better = not lower_is_better(args.metric_for_best_model)


def criterion_of(task, args: TrainingArguments) -> Callable[..., torch.Tensor] | None:
    """The task's criterion, smoothed as `args` say."""
    smoothing = {"label_smoothing": args.label_smoothing_factor} if args.label_smoothing_factor else {}
    return partial(task.criterion, **smoothing) if task.criterion else None


def settle(args: TrainingArguments, task) -> None:
    """Fill in what `args` leave to the task.

    Raises: ValueError for a setting that the task does not have, and as `choose_best_by`.
    """
    choose_best_by(args, task.main_metric, among=task.metrics)
    if args.label_smoothing_factor and not task.criterion:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on {task.name}, whose loss is the "
            "model's own; leave it out"
        )
    task.check_parts(args.gradient_accumulation_steps * args.world_size)
    if task.has_own_order:
        raise ValueError("Trainer shuffles the rows; carry_state=True is for recipes/pretrain.py")


def build_trainer(model, task, args: TrainingArguments, *, folder: Path, callbacks: Sequence = ()) -> TaskTrainer:
    """The trainer of the task's rows, with its loss and metrics, and with checkpoints in `folder`.

    Raises: ValueError as `check_whole_weights`.
    """
    if args.channels_last:
        lay_out_channels_last(model, args.device)
    args.output_dir = str(folder)
    args.dataloader_pin_memory &= torch.cuda.is_available()
    args.remove_unused_columns = False  # the task's rows hold what its collator reads
    args.include_num_input_tokens_seen = "no"  # counted by the task
    trainer = TaskTrainer(model, args, task, callbacks=callbacks)
    check_whole_weights(args, is_sharded=trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    return trainer


def check_whole_weights(args: TrainingArguments, *, is_sharded: bool) -> None:
    """Raises: ValueError for settings that read or change single parameters, if devices hold parts of them."""
    given = {name: getattr(args, name) for name in ("ema_decay", "l1_penalty", "optimizer", "unfreeze_epochs")}
    if is_sharded and any(given.values()):
        said = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        raise ValueError(
            f"{said}: not under FSDP or DeepSpeed, because whole weights are needed on every device; leave out one or "
            "the other"
        )


def lay_out_channels_last(model: torch.nn.Module, device: torch.device) -> None:
    """Put the channels of the weights last in memory, and with them those of all maps that convolutions make.

    Raises: ValueError for a strided 1x1 convolution on a CPU: oneDNN's backward of it writes beyond its memory
    (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and device.type == "cpu":
            if module.kernel_size == (1, 1) and module.stride != (1, 1):
                raise ValueError(
                    f"channels_last is not safe on a CPU for a strided 1x1 convolution ({name}); leave it out"
                )
    model.to(memory_format=torch.channels_last)


def evaluate(trainer: TaskTrainer, task) -> Results:
    """Measure the trained model on the validation and test rows."""

    def predict_split(split: str) -> list:
        return trainer.predictions(trainer.get_eval_dataloader(task.rows[split]), split)

    return measure(task, trainer.accelerator.unwrap_model(trainer.model), predict_split, seed=trainer.args.seed)


def save(trainer: TaskTrainer, directory: str | Path, *, merge: bool):
    """Write the trained model (or its adapter; `merge` adds it to the weights first) and its processor; all ranks."""
    if merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model_wrapped = trainer.model
    trainer.save_model(str(directory))
    if trainer.is_world_process_zero():
        (Path(directory) / "training_args.bin").unlink(missing_ok=True)  # a pickle that no one should load


def loop_arguments(args: TrainingArguments) -> LoopArguments:
    """What the project's own loop would be told, to do as this Trainer does.

    Raises: ValueError for an optimizer that the loop does not have.
    """
    if not args.optimizer and not args.optim.startswith("adamw"):
        raise ValueError(
            f"find_lr has no {args.optim.value}, and another optimizer needs another rate; leave optim out and "
            f"set optimizer to one of {', '.join(OPTIMIZERS)}"
        )
    share = args.per_device_train_batch_size * args.gradient_accumulation_steps
    precision = "bf16" if args.bf16 else "fp32"
    names = "output_dir seed learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon".split()
    same = {name: getattr(args, name) for name in (*names, *(f.name for f in fields(SharedArguments)))}
    sizes = {"batch_size": share * args.world_size, "micro_batch_size": args.per_device_train_batch_size}
    return LoopArguments(optimizer=args.optimizer or "adamw", precision=precision, **same, **sizes)


def steps_per_epoch(args: TrainingArguments, num_rows: int) -> int:
    """Optimizer steps of an epoch, counted as Trainer counts them."""
    batches = math.ceil(num_rows / (args.per_device_train_batch_size * args.world_size))
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def total_steps(args: TrainingArguments, num_rows: int) -> int:
    """Optimizer steps of the run."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_per_epoch(args, num_rows))
