"""Which process holds which weights and reads which rows: data parallelism, FSDP2, HSDP and tensor parallelism.

transformers.distributed shards the model, by the plans in its configuration.  N processes are numbered so that the
copies of a replica (`dp_replicate_size`) are furthest apart and the cuts of a matrix (`tp_size`) are neighbours, which
a launcher puts on one machine.  Processes that hold the cuts of one matrix read the same rows.

Sources: Zhao et al. 2023, arXiv:2304.11277 (FSDP); Shoeybi et al. 2019, arXiv:1909.08053 (tensor parallelism).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from bmtk.errors import UserError

from .guards import STATISTICS


class ShardingSettings(Protocol):
    """What `ProcessLayout.of` reads of a run's settings."""

    fsdp_size: int
    dp_replicate_size: int
    tp_size: int


@dataclass(frozen=True)
class ProcessLayout:
    """How many processes hold what: each of `dp_replicate_size` replicas is cut into `fsdp_size` x `tp_size` parts."""

    fsdp_size: int = 1
    dp_replicate_size: int = 1
    tp_size: int = 1

    @classmethod
    def of(cls, args: ShardingSettings, num_processes: int) -> "ProcessLayout":
        """The layout that `args` ask for; dp_replicate_size=0 takes as many replicas as the processes make.

        Raises: UserError if the processes do not divide that way.
        """
        cuts = args.fsdp_size * args.tp_size
        replicas, rest = divmod(num_processes, cuts)
        wanted = args.dp_replicate_size or replicas
        if rest or wanted != replicas or not replicas:
            sizes = f"fsdp_size={args.fsdp_size} x tp_size={args.tp_size}"
            if args.dp_replicate_size:
                sizes += f" x dp_replicate_size={args.dp_replicate_size}"
            needed = cuts * max(1, args.dp_replicate_size)
            raise UserError(
                f"{sizes} needs {needed} processes{'' if args.dp_replicate_size else ' or a multiple'}, and "
                f"{num_processes} were started; start them (accelerate launch --multi_gpu --num_processes {needed} "
                "...), or change the sizes"
            )
        return cls(args.fsdp_size, replicas, args.tp_size)

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a part of the weights."""
        return self.fsdp_size * self.tp_size > 1

    @property
    def num_shares(self) -> int:
        """Into how many parts the rows of a step are divided."""
        return self.fsdp_size * self.dp_replicate_size

    def share(self, process_index: int) -> dict[str, int]:
        """The part of the rows that a process reads: arguments of `TrainingObjective.train_batches`."""
        return {"rank": process_index // self.tp_size, "world_size": self.num_shares}

    def is_copy(self, process_index: int) -> bool:
        """Whether another process of a lower number reads the same rows."""
        return process_index % self.tp_size > 0

    def sum_over_shares(self, accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
        """Sum over the parts of a step.  Whole numbers are rounded up, if only some processes of a part have them."""
        if accelerator.num_processes == 1:
            return values
        total: torch.Tensor = accelerator.reduce(values)
        if self.tp_size == 1:
            return total
        return total / self.tp_size if total.is_floating_point() else -(-total // self.tp_size)


def shard(model: PreTrainedModel, layout: ProcessLayout, device: torch.device) -> PreTrainedModel:
    """Cut the weights of `model`, which are equal on every process, and keep this process's part of them.

    Raises: UserError if the model has no plan for it.
    """
    from transformers.distributed import DistributedConfig

    _check_plans(model, layout)
    if layout.tp_size > 1:
        _untie(model)
    sizes: dict[str, Any] = asdict(layout)
    _, _, mesh = type(model).prepare_distribute_model(DistributedConfig(**sizes))
    shared = _take_shared_norms(model) if layout.tp_size > 1 and layout.num_shares == 1 else []
    whole_model: Any = model
    sharded: Any = whole_model.to(device)
    if layout.tp_size > 1:  # before FSDP, which has to see that tied weights are one
        config = DistributedConfig(tp_size=layout.tp_size)
        sharded = type(model).maybe_distribute_model(sharded, config, mesh)
        sharded.tie_weights()
    if layout.num_shares > 1:
        config = DistributedConfig(**sizes | {"tp_size": 1})
        sharded = type(model).maybe_distribute_model(sharded, config, mesh)
    for parameter in shared:
        parameter.register_hook(_summed)
    if layout.num_shares > 1:
        # The root's own weights stay whole between the forward and the backward pass by default, and after an
        # evaluation for ever: what an average of weights puts into the model would not be seen.
        sharded.set_reshard_after_forward(True, recurse=False)
        # A layer that is called before the whole model, in an evaluation, would take itself for the root.
        sharded._get_fsdp_state()._lazy_init()
    return cast(PreTrainedModel, sharded)


def plain_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of a model as it was before fully_shard made a class of its own of it."""
    from torch.distributed.fsdp import FSDPModule

    kind = type(model)
    plain = next(base for base in kind.__mro__ if not issubclass(base, FSDPModule)) if is_fsdp(model) else kind
    return cast(type[PreTrainedModel], plain)


def is_fsdp(model: nn.Module) -> bool:
    """Whether the weights of `model` are gathered for each forward pass, in which all processes must take part."""
    return _fsdp_root(model) is not None


def _fsdp_root(model: nn.Module) -> nn.Module | None:
    """The sharded model: itself, or the one under an adapter."""
    from torch.distributed.fsdp import FSDPModule

    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a part of one that is spread over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def by_mesh(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in groups that one operation can compute with: torch mixes neither meshes nor plain tensors."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())


def on_whole_matrices(function: Callable[[torch.Tensor], torch.Tensor], matrices: torch.Tensor) -> torch.Tensor:
    """Apply `function` to matrices (N, A, B); each process gets some of those that are spread, whole."""
    if not is_dtensor(matrices):
        return function(matrices)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    spread: Any = matrices
    is_cut = [place.is_shard() for place in spread.placements]
    # Of matrices that are cut twice, torch (2.13) moves some parts to the wrong place.
    divided = [Shard(0) if cut and sum(is_cut) == 1 else Replicate() for cut in is_cut]
    given = spread.redistribute(placements=divided)
    sizes = {"shape": spread.shape, "stride": spread.stride()}
    results: Any = DTensor.from_local(function(given.to_local()), given.device_mesh, divided, **sizes)
    made: torch.Tensor = results.redistribute(placements=spread.placements)
    return made


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes, all of which must call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The part that this process holds of a whole tensor, where `weight` is spread over processes; numbers stay."""
    if not is_dtensor(weight) or is_dtensor(tensor) or not tensor.ndim:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = weight
    return distribute_tensor(tensor, spread.device_mesh, spread.placements, src_data_rank=None)  # without a message


def _check_plans(model: PreTrainedModel, layout: ProcessLayout) -> None:
    """Raises: UserError if the plans of the model's configuration do not fit it, or the sizes."""
    names = {_wildcard(name): module for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    cut = [name for name in model.tp_plan or () if name in names and names[name] is not head]
    if layout.tp_size > 1 and not cut:
        raise UserError(
            f"tp_size={layout.tp_size}: {type(model).__name__} has no plan for tensor parallelism "
            "(base_model_tp_plan); leave tp_size out, and set fsdp_size"
        )
    if layout.num_shares > 1 and not set(names) & set(model.fsdp_plan or ()):
        raise UserError(
            f"fsdp_size={layout.fsdp_size}: the plan of {type(model).__name__} (base_model_fsdp_plan) names none of "
            "its modules; leave fsdp_size out"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(model.config, name, None)
        if count and count % layout.tp_size:
            raise UserError(f"tp_size={layout.tp_size} does not divide {name}={count}; choose a divisor of it")


def _take_shared_norms(model: PreTrainedModel) -> list[nn.Parameter]:
    """Take modules out of the plan whose weights every process has, and a part of the gradient; return the weights.

    transformers (5.23) adds up what has gathered in `grad` after each backward pass, so an accumulated gradient is
    counted several times; weights that FSDP gathers are free of it.
    """
    style = "replicated_with_grad_allreduce"
    shared = {name for name, kind in model.tp_plan.items() if kind == style}
    model._tp_plan = {name: kind for name, kind in model.tp_plan.items() if name not in shared}
    modules = (module for name, module in model.named_modules() if _wildcard(name) in shared)
    return [parameter for module in modules for parameter in module.parameters()]


def _summed(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient added up over all processes."""
    total = gradient.clone()
    torch.distributed.all_reduce(total)
    return total


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """The names of weights that are another's, with its name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _untie(model: PreTrainedModel) -> None:
    """Give tied weights parameters of their own: the engine cuts them one by one, and they are tied again then."""
    for name in tied_weights(model):
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_parameter(last, nn.Parameter(getattr(module, last).detach()))


def _wildcard(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let the body call any part of a model: what no layer gathers for itself, such as the embedding, is gathered.

    Statistics (of BatchNorm) are those of the main process, as they are where a model is not sharded.
    """
    sharded: Any = _fsdp_root(model)
    if sharded is None:
        yield
        return
    for name, buffer in model.named_buffers():
        if name.endswith(STATISTICS):
            torch.distributed.broadcast(buffer, src=0)
    sharded.set_reshard_after_forward(False, recurse=False)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()
        sharded.set_reshard_after_forward(True, recurse=False)
