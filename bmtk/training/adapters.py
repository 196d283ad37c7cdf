"""What of a pretrained model is trained: all, its head alone, or low-rank updates beside frozen weights (LoRA)."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bmtk.errors import UserError

from .quantization import QUANTIZATIONS

if TYPE_CHECKING:  # peft takes a quarter of a second, also of runs without an adapter
    from peft import PeftModel

ADAPTERS = ("lora", "dora")
ADAPTER_CONFIG = "adapter_config.json"  # the file that makes a folder an adapter


@dataclass
class AdapterArguments:
    """Whether all weights are trained, those of the head, or a low-rank update."""

    _argument_group_name = "adapter"

    adapter: str | None = field(
        default=None,
        metadata={"help": "lora, or dora: train low-rank updates of the trunk's matrices, and the head; default: all"},
    )
    lora_rank: int = field(default=8, metadata={"help": "rank of the update of a matrix"})
    lora_alpha: float = field(default=16, metadata={"help": "the update is multiplied by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "probability, on what the update reads"})
    freeze_backbone: bool = field(
        default=False, metadata={"help": "train the head alone (a linear probe); all else stays as it was pretrained"}
    )
    quantize: str | None = field(
        default=None,
        metadata={"help": "4bit or 8bit: keep the frozen weights under an adapter so (QLoRA); needs bitsandbytes"},
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "save a whole model with the update added to its weights, not the adapter"}
    )

    def __post_init__(self) -> None:
        if self.adapter not in (None, *ADAPTERS):
            raise UserError(
                f"adapter={self.adapter!r} is unknown; choose {' or '.join(ADAPTERS)}, or leave it out to train all "
                "weights"
            )
        if self.quantize not in (None, *QUANTIZATIONS):
            raise UserError(
                f"quantize={self.quantize!r} is unknown; choose {' or '.join(QUANTIZATIONS)}, or leave it out"
            )
        if self.quantize and not self.adapter:
            raise UserError(f"quantize={self.quantize} leaves weights that cannot be trained: set adapter to lora")
        if self.quantize and self.merge_adapter:
            raise UserError(f"merge_adapter would round the update to quantize={self.quantize}; leave one of them out")
        if self.lora_rank < 1:
            raise UserError(f"lora_rank={self.lora_rank} must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout={self.lora_dropout} is not a probability; choose 0 <= lora_dropout < 1")
        if self.merge_adapter and self.adapter is None:
            raise UserError("merge_adapter needs an adapter: set adapter to lora")
        if self.freeze_backbone and self.adapter:
            raise UserError("freeze_backbone trains the head alone, adapter more than that; set one of them")

    @property
    def purpose(self) -> str | None:
        """What is done to a pretrained model, for an error; None: nothing that needs one."""
        if self.freeze_backbone:
            return "freeze_backbone trains the head of"
        return f"adapter={self.adapter} changes" if self.adapter else None


def is_adapted(model: object) -> "TypeGuard[PeftModel]":
    """Whether an adapter is around the model; who made it has imported peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def adapt(model: PreTrainedModel, args: AdapterArguments, *, task_type: str | None) -> "PreTrainedModel | PeftModel":
    """Make trainable what `args` ask for: all of `model`, its head alone, or an adapter."""
    if args.freeze_backbone:
        freeze_backbone(model)
    return add_adapter(model, args, task_type=task_type) if args.adapter else model


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leave only the head of `model` trainable; below it, dropout and statistics of norms rest as in evaluation.

    Raises: UserError if nothing would be left to train.
    """
    backbone = model.base_model
    backbone.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze_backbone leaves nothing to train: a {type(model).__name__} has no weights of its own")
    backbone.register_forward_pre_hook(_rest)  # before every forward: Trainer's train() is for the whole model


def _rest(module: torch.nn.Module, inputs: object) -> None:
    module.eval()


def add_adapter(model: PreTrainedModel, args: AdapterArguments, *, task_type: str | None) -> "PeftModel":
    """Freeze `model` and add trainable low-rank updates to its trunk; the head is trained whole.

    They are added to linear layers, convolutions of one group, and the matrices of recurrent layers.
    Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); on all layers: Dettmers et al. 2023, arXiv:2305.14314; Liu et al.
    2024, arXiv:2402.09353 (DoRA).  Raises: UserError for a trunk without matrices, or DoRA of recurrent layers.
    """
    from peft import LoraConfig, get_peft_model

    heads = [
        name for name, module in model.named_children() if name != model.base_model_prefix and _has_weights(module)
    ]
    layers, matrices = adaptable(model.base_model)
    if not layers and not matrices:
        raise UserError(f"adapter={args.adapter}: a {type(model).__name__} has no matrices; leave adapter out")
    if matrices and args.adapter == "dora":
        raise UserError("adapter=dora knows no recurrent layers; choose lora")
    if matrices and args.lora_dropout:
        raise UserError(f"lora_dropout={args.lora_dropout} does not reach recurrent matrices; leave it out")
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    config = LoraConfig(
        task_type=task_type,
        r=args.lora_rank,
        lora_alpha=cast(Any, args.lora_alpha),  # a fraction works, too
        lora_dropout=args.lora_dropout,
        use_dora=args.adapter == "dora",
        target_modules=[prefix + name for name in layers],
        target_parameters=[prefix + name for name in matrices] or None,
        modules_to_save=heads,
    )
    with _no_future_warnings():
        return get_peft_model(model, config)


def adaptable(trunk: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names of the layers whose matrix may get an update, and of the matrices of recurrent layers."""
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
    found = ((name, module) for name, module in trunk.named_modules() if isinstance(module, kinds))
    layers = [name for name, module in found if getattr(module, "groups", 1) == 1]
    matrices = [
        f"{name}.{key}"
        for name, module in trunk.named_modules()
        if isinstance(module, nn.RNNBase)
        for key, parameter in module.named_parameters()
        if parameter.ndim == 2
    ]
    return layers, matrices


def load_adapter(model: PreTrainedModel, name: str) -> "PeftModel":
    """`model` with the adapter in the folder or Hub repository `name`."""
    from peft import PeftModel

    with _no_future_warnings():
        return PeftModel.from_pretrained(model, name)


@contextmanager
def _no_future_warnings() -> Iterator[None]:
    """peft 0.21 asks a model of transformers 5.23 for `is_gradient_checkpointing`, a name that is going out of use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _has_weights(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None
