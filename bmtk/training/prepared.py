"""A model and its optimizer, made ready for the devices that a launcher gave."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    extract_model_from_parallel,
    str_to_bool,
)
from transformers import PreTrainedModel

from bmtk.errors import UserError

from .arguments import LoopArguments
from .averaging import WeightAverage
from .optimizers import NamedOptimizer, build_optimizer, multiplies_bfloat16_fast
from .sharding import ProcessLayout, shard
from .waits import set_timeouts

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class Prepared:
    """What is trained, by what, and where; checkpoints hold the first two."""

    model: torch.nn.Module  # wrapped for several devices, and compiled if the settings ask for it
    optimizer: NamedOptimizer
    accelerator: Accelerator
    layout: ProcessLayout = ProcessLayout()

    @property
    def share(self) -> dict[str, int]:
        """The part of each step's rows that this process reads: `rank` and `world_size`."""
        return self.layout.share(self.accelerator.process_index)

    @property
    def is_copy(self) -> bool:
        """Whether another process of a lower number reads the very same rows."""
        return self.layout.is_copy(self.accelerator.process_index)

    @property
    def unwrapped(self) -> PreTrainedModel:
        """The model itself."""
        model: PreTrainedModel = extract_model_from_parallel(self.model, keep_torch_compile=False)
        return model


def build_accelerator(args: LoopArguments) -> Accelerator:
    """Make the accelerator of the devices that the launcher gave, with the precision that `args` ask for.

    Raises: UserError for a way of distribution that the loop cannot save and resume yet.
    """
    if engines_of_accelerate():
        raise UserError(
            "this recipe shards models itself, without accelerate's FSDP and DeepSpeed: leave --use_fsdp and "
            "--use_deepspeed out of accelerate launch (accelerate_configs/multi_gpu.yaml), and set fsdp_size"
        )
    precision = natural_precision() if args.precision == "auto" else args.precision
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        dynamo_backend="inductor" if args.torch_compile else "no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=args.timeout_minutes)),
        ],
    )
    ProcessLayout.of(args, accelerator.num_processes)  # refuses sizes before any folder is made
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"distributed_type={accelerator.distributed_type.value} is not supported by this loop; "
            f"choose one of {', '.join(kind.value for kind in SUPPORTED)} in the accelerate configuration"
        )
    return accelerator


def engines_of_accelerate() -> list[str]:
    """What accelerate launch was asked to shard by, as its variables are named."""
    # On CPUs accelerate drops the first without a word.
    engines = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return [name for name in engines if str_to_bool(os.environ.get(name, "false"))]


def natural_precision() -> str:
    """bf16 where the device multiplies it faster than fp32: CUDA devices and CPUs with instructions for it."""
    return "bf16" if multiplies_bfloat16_fast("cuda" if torch.cuda.is_available() else "cpu") else "fp32"


def prepare(model: PreTrainedModel, args: LoopArguments, accelerator: Accelerator) -> Prepared:
    """Shard the model or wrap it for the devices (and compile it), as `args` ask, and make its optimizer."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    layout = ProcessLayout.of(args, accelerator.num_processes)
    if layout.is_sharded:
        model = shard(model, layout, accelerator.device)
        set_timeouts(accelerator)
    optimizer = build_optimizer(model, args)
    # A sharded model is not wrapped for several devices, and accelerate's optimizers are not ours.
    wrapped = accelerator.prepare_model(model, evaluation_mode=layout.is_sharded)
    if args.ema_decay:
        optimizer.average = WeightAverage(optimizer.names, args.ema_decay)
    return Prepared(wrapped, optimizer, accelerator, layout)
