"""`transformers.Trainer` with a model that is spread over processes by `fsdp_size`, as in the project's own loop.

    checkpoint-12/  model-00001-of-00002.safetensors ... and their index: what from_pretrained reads
                    adapter_model.safetensors                       in place of them, where an adapter is trained
                    optimizer-00001-of-00002.safetensors ...        optimizer state by parameter name
                    averages-00001-of-00002.safetensors ...         averaged weights, if the run averages

Trainer itself trains a model that transformers.distributed has sharded, and can neither clip, save nor resume it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from bmtk.errors import UserError

from .averaging import AVERAGES, WeightAverage
from .checkpoint import load_parts, read_optimizer
from .description import plain_twin
from .finetuning_arguments import FineTuningArguments
from .gradients import gradient_norm
from .optimizers import NamedOptimizer, trained_parameters
from .resume import check_best
from .sharding import ProcessLayout, by_mesh, is_fsdp, shard, whole
from .snapshot import flat, stored_weights
from .tensor_files import opened, write_index, write_share
from .trainer_patches import PatchedTrainer

BY_NAME = ("adamw_torch", "adamw_torch_fused")  # optimizers of Trainer whose state is tensors of the weights' shapes


def spread(model: PreTrainedModel | PeftModel, args: FineTuningArguments) -> None:
    """Shard the model over processes if `args` ask for it; every process must have the same weights.

    Raises: UserError for settings that need whole weights, or if the model has no plan for it.
    """
    layout = ProcessLayout.of(args, args.world_size)
    whole_model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[assignment]
    if layout.is_sharded and not is_fsdp(model):
        _check_settings(whole_model, args)
        shard(whole_model, layout, args.device)


def _check_settings(model: PreTrainedModel, args: FineTuningArguments) -> None:
    name = getattr(args.optim, "value", args.optim)
    if not args.optimizer and name not in BY_NAME:
        raise UserError(
            f"optim={name} is not known to keep a state that fsdp_size={args.fsdp_size} can spread; choose one of "
            f"{', '.join(BY_NAME)}, or set optimizer in place of it"
        )
    if getattr(model, "quantization_method", None):
        raise UserError(f"quantize keeps weights in a form that fsdp_size={args.fsdp_size} cannot cut; leave one out")


class ShardedTrainer(PatchedTrainer):
    """A trainer whose model may be spread over processes; of a model that is not, it is `PatchedTrainer`."""

    args: FineTuningArguments

    def __init__(self, model: PreTrainedModel | PeftModel, args: FineTuningArguments, **others: Any):
        # Trainer refuses to save more of a sharded model than its weights.
        only_model, args.save_only_model = args.save_only_model, args.fsdp_size > 1
        super().__init__(cast(Any, model), args, **others)
        args.save_only_model = only_model

    @property
    def is_spread(self) -> bool:
        """Whether each process holds a part of the weights, by the project's own settings."""
        return self.args.fsdp_size > 1

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Each micro-batch's gradients are added up at once: those that wait are whole, and outlive a rehearsal."""
        yield

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """Fault (transformers 5.23): the norm of gradients that are spread is left in parts."""
        if not self.is_spread:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = gradient_norm(parameter.grad for parameter in parameters)
        for group in by_mesh(parameters):
            torch.nn.utils.clip_grads_with_norm_(group, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if self.is_spread and grad_norm is None:
            self.accelerator.unscale_gradients()
            grad_norm = gradient_norm(parameter.grad for parameter in model.parameters())
        return super()._get_grad_norm(model, grad_norm)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; into a checkpoint each process its part, into other folders the main one all of it."""
        model: Any = self.model
        if not (self.is_spread and _internal_call) or isinstance(model, PeftModel):
            return super().save_model(output_dir, _internal_call)
        folder, weights = Path(str(output_dir)), stored_weights(model)
        if self.args.should_save:
            self._describe(folder, {})
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # with no tensor in it
            write_index(folder, "model", weights, self.args.world_size)
        self.accelerator.wait_for_everyone()  # save_pretrained deletes parts that it does not know
        write_share(folder, "model", weights, self.accelerator)
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Fault (transformers 5.23): what is saved of a sharded model names a class that no one can import."""
        if not is_fsdp(cast(torch.nn.Module, self.model)):
            return super()._save(output_dir, state_dict)
        weights = state_dict or self._gathered_weights()
        if self.args.should_save:
            self._describe(Path(str(output_dir)), weights)
        return None

    def _gathered_weights(self) -> dict[str, torch.Tensor]:
        """What is saved, whole, on the main process; of an adapter what it adds, under the model's names."""
        model: Any = self.model
        weights = stored_weights(model)
        if isinstance(model, PeftModel):
            weights = {name: weights[name] for name in _names_in_adapter(model).values()}
        kept: dict[str, torch.Tensor] = {}
        for name, value in weights.items():
            gathered = whole(value.detach())
            kept |= {name: gathered.cpu()} if self.args.should_save else {}
        return kept

    def _describe(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write configuration, code, processor and `weights`, as from_pretrained reads them."""
        model: Any = self.accelerator.unwrap_model(self.model)
        described: Any = model if isinstance(model, PeftModel) else plain_twin(model)
        described.save_pretrained(folder, state_dict=dict(weights))
        if self.processing_class is not None:
            cast(Any, self.processing_class).save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_spread:
            return super()._save_optimizer_and_scheduler(output_dir)
        folder, optimizer = Path(output_dir), self._named_optimizer()
        write_share(folder, "optimizer", flat(optimizer.state_dict()["state"]), self.accelerator)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)
        return None

    def _save_average(self, average: WeightAverage, folder: Path) -> None:
        if not self.is_spread:
            return super()._save_average(average, folder)
        write_share(folder, AVERAGES, average.state_dict(), self.accelerator)
        return None

    def _named_optimizer(self) -> NamedOptimizer:
        """The optimizer, with a state by the names of the weights."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, NamedOptimizer):
            return optimizer
        return NamedOptimizer([optimizer], trained_parameters(cast(torch.nn.Module, self.model)))

    def _read_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the state by its names, if several processes have written it or share it out.

        Trainer puts a whole state on the device of each process, where a part of it has to fit.
        """
        if not checkpoint or not (self.is_spread or _is_in_parts(Path(checkpoint))):
            return super()._read_optimizer_and_scheduler(checkpoint)
        folder, optimizer = Path(checkpoint), self._named_optimizer()
        if _is_in_parts(folder):
            optimizer.load_state_dict({"state": read_optimizer(folder, optimizer)})
        else:
            whole = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            optimizer.load_state_dict(whole)
        cast(Any, self.lr_scheduler).load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.is_spread:
            return super()._load_from_checkpoint(resume_from_checkpoint, cast(Any, model))
        self._read_weights(Path(resume_from_checkpoint))
        return None

    def _load_best_model(self) -> None:
        if not self.is_spread:
            return super()._load_best_model()
        folder = Path(str(self.state.best_model_checkpoint))
        check_best(folder)
        self._read_weights(folder)
        return None

    @torch.no_grad()
    def _read_weights(self, folder: Path) -> None:
        model: Any = self.model
        if not isinstance(model, PeftModel):
            return load_parts(folder, model)
        weights, names = model.state_dict(), _names_in_adapter(model)
        with opened(folder, "adapter_model") as files:
            for name in files:
                weights[names[name]].copy_(files.read(name, like=weights[names[name]]))
        return None


def _names_in_adapter(model: PeftModel) -> dict[str, str]:
    """What an adapter's files call each of its weights, with the name in the model."""
    names = list(model.state_dict())
    numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
    return {saved: names[int(number)] for saved, number in get_peft_model_state_dict(model, numbers).items()}


def _is_in_parts(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of a model that was spread."""
    return any(checkpoint.glob("optimizer*.safetensors"))
