"""Optimizers and their parameter groups.

Matrices are decayed; lookup tables, norms and biases are not.  With Muon, the matrices of the trunk's linear layers
and the filters of its two-dimensional convolutions go to Muon, and everything else to AdamW: an embedding's rows and
an output head's rows are looked up one by one, so making their update orthogonal means nothing (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bmtk.errors import UserError

from .adapters import is_adapted
from .averaging import WeightAverage
from .layers import decay_rates_by_depth
from .sharding import by_mesh, cut_like, on_whole_matrices

if TYPE_CHECKING:
    from peft import PeftModel


MIN_INPUTS = 8  # channels that filters read, to be a matrix; pixels have four at most


class OptimizerSettings(Protocol):
    """What an optimizer is made of: LoopArguments, or FineTuningArguments with an `optimizer`."""

    optimizer: str
    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    muon_learning_rate: float
    muon_momentum: float
    sgd_momentum: float
    layer_lr_decay: float


class NamedOptimizer(torch.optim.Optimizer):
    """Several torch optimizers that step as one, with a state keyed by parameter name instead of by position.

    A state by name survives another order of the parameters or groups, and can be stored without pickle.
    `param_groups` are the very groups of the optimizers inside; each has "initial_lr", the peak learning rate.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], names: dict[nn.Parameter, str]):
        # The parent's constructor would make param_groups of its own; ours are shared with the optimizers inside.
        self.optimizers = optimizers
        self.names = names
        self.average: WeightAverage | None = None  # of the weights; whoever calls `step` updates it
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, torch.Tensor]]:  # type: ignore[override]
        """State of every parameter that has been stepped."""
        states = (cast(dict[nn.Parameter, Any], optimizer.state) for optimizer in self.optimizers)
        return {parameter: state for each in states for parameter, state in each.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order of the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def can_skip_on_device(self) -> bool:
        """Whether `skip_if` works: fused AdamW reads the flag in its kernel, Muon knows no such flag."""
        return all(isinstance(optimizer, torch.optim.AdamW) for optimizer in self.optimizers)

    def skip_if(self, flag: torch.Tensor | None) -> None:
        """Make the next steps do nothing where `flag` (0-dim float, 0 or 1, on the device) is 1; None ends that."""
        for optimizer in self.optimizers:
            fused = cast(Any, optimizer)  # what torch's GradScaler sets, too
            fused.found_inf, fused.grad_scale = flag, None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return {"state": {parameter name: {key: tensor}}}; settings come from the run's arguments, not from here."""
        return {"state": {self.names[parameter]: dict(state) for parameter, state in self.state.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state made by `state_dict`, or by a torch optimizer of the same groups, which numbers weights.

        Raises: UserError if it holds parameters or shapes that this model does not have.
        """
        given = dict(state_dict["state"])
        if groups := state_dict.get("param_groups"):
            sizes, own = ([len(group["params"]) for group in some] for some in (groups, self.param_groups))
            if sizes != own:
                raise UserError(
                    f"the optimizer state has groups of {sizes} parameters, this run has {own}; resume with the "
                    "settings that were saved"
                )
            numbers = [number for group in groups for number in group["params"]]
            names = (self.names[parameter] for parameter in self.parameters)
            given = {name: given[number] for name, number in zip(names, numbers, strict=True) if number in given}
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = given.pop(self.names[parameter], None)
                if state is not None:
                    optimizer.state[parameter] = _placed(state, parameter, self.names[parameter])
        if given:
            raise UserError(
                f"the optimizer state holds parameters that the model does not train: {', '.join(sorted(given))}; "
                "resume with the model that was saved"
            )


def _placed(state: dict[str, torch.Tensor], parameter: nn.Parameter, name: str) -> dict[str, torch.Tensor]:
    for key, value in state.items():
        if value.ndim and value.shape != parameter.shape:
            raise UserError(
                f"optimizer state {key} of {name} has the shape {tuple(value.shape)}, the parameter has "
                f"{tuple(parameter.shape)}; resume with the model that was saved"
            )
    return {key: cut_like(value, parameter).to(parameter.device, copy=True) for key, value in state.items()}


class Muon(torch.optim.Muon):
    """torch's Muon, with the matrices of one shape made orthogonal together, in a precision the device is fast in.

    torch multiplies in bfloat16 everywhere; CPUs without instructions for it need some fifty times as long then.
    The filters of a convolution (outputs, inputs, height, width) are a matrix of `outputs` rows.
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95):
        matrix = parameters[0].new_empty(0, 0)  # torch refuses filters, whose update it does not know
        super().__init__([matrix], lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.param_groups.clear()
        self.add_param_group({"params": parameters})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[Any, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike = parameter.shape, getattr(parameter, "placements", None)  # the second of sharded ones
                    by_shape.setdefault(alike, []).append(parameter)
            for (shape, _), parameters in by_shape.items():
                updates = torch.stack([self._momentum(parameter, group).flatten(1) for parameter in parameters])
                rate = group["lr"] * max(1, updates.shape[1] / updates.shape[2]) ** 0.5
                directions = on_whole_matrices(partial(orthogonal, group=group), updates)
                for parameter, direction in zip(parameters, directions.view(-1, *shape), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)

    def _momentum(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> torch.Tensor:
        """The gradient after (Nesterov) momentum."""
        gradient = parameter.grad
        assert gradient is not None
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer


def orthogonal(matrices: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Matrices (N, A, B) with their singular values moved to about 1, by the quintic Newton-Schulz iteration.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = group["ns_coefficients"]
    x = matrices.to(torch.bfloat16 if multiplies_bfloat16_fast(matrices.device.type) else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def multiplies_bfloat16_fast(device_type: str) -> bool:
    """Whether CUDA devices, or this CPU, have instructions for products of bfloat16."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = torch.cpu.get_capabilities()
    # With kernels for less, which ATEN_CPU_CAPABILITY may ask for, torch's attention in bfloat16 fails on such a CPU.
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return bool(instructions.get("avx512_bf16") or instructions.get("amx_bf16"))


def build_optimizer(model: "PreTrainedModel | PeftModel", args: OptimizerSettings) -> NamedOptimizer:
    """Make the optimizer that `args` name, over the parameters of `model` that require a gradient.

    Raises: UserError if nothing is trainable, if Muon finds no matrix, or layer_lr_decay no layers.
    """
    whole: Any = model.get_base_model() if is_adapted(model) else model
    names = trained_parameters(model)
    if not names:
        raise UserError("the model has no trainable parameter; set requires_grad on those that are to be trained")
    hidden = set(_hidden_matrices(whole)) if args.optimizer == "muon" else set()
    rest, matrices = [parameter for parameter in names if parameter not in hidden], set(decayed_matrices(model))
    optimizers: list[torch.optim.Optimizer] = []
    if rest:
        make = _sgd if args.optimizer == "sgd" else _adamw
        optimizers.append(make(_decay_groups(rest, matrices, args.weight_decay), args))
    if args.optimizer == "muon":
        optimizers.append(_muon([parameter for parameter in names if parameter in hidden], args))
    decay_rates_by_depth(optimizers, model, args.layer_lr_decay)
    return NamedOptimizer(optimizers, names)


def trained_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """The parameters that get a gradient, with their names."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def decayed_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained weights of two and more dimensions that are no lookup tables."""
    tables = _tables(model)
    return [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and p not in tables]


def _decay_groups(
    parameters: list[nn.Parameter], matrices: set[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in parameters if parameter in matrices]
    others = [parameter for parameter in parameters if parameter not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # A fused step computes with all tensors of a group at once.
    return [{**group, "params": alike} for group in groups for alike in by_mesh(group["params"])]


def _adamw(groups: list[dict[str, Any]], args: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    betas = args.adam_beta1, args.adam_beta2
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, fused=True)


def _sgd(groups: list[dict[str, Any]], args: OptimizerSettings) -> torch.optim.SGD:
    """SGD with Nesterov momentum; its weight decay is the factor of an L2 penalty, added to the gradient."""
    momentum = args.sgd_momentum
    return torch.optim.SGD(groups, lr=args.learning_rate, momentum=momentum, nesterov=momentum > 0)


def _muon(parameters: list[nn.Parameter], args: OptimizerSettings) -> Muon:
    if not parameters:
        raise UserError("optimizer='muon' found no trainable matrix in the model's layers; use 'adamw'")
    rate, momentum = args.muon_learning_rate, args.muon_momentum
    return Muon(parameters, lr=rate, momentum=momentum, weight_decay=args.weight_decay)


def _hidden_matrices(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Weights of linear layers and filters in the trunk: no head, no lookup table, no table shared with a head.

    The filters that read the pixels have few inputs, and those of different groups read different ones: they are no
    matrices.
    """
    head = model.get_output_embeddings()
    apart = _tables(model) if head is None else _tables(model) | {head.weight}
    for module in model.base_model.modules():
        is_matrix = isinstance(module, nn.Linear | Conv1D)
        is_matrix |= isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels >= MIN_INPUTS
        if is_matrix and module.weight not in apart:
            yield cast(nn.Parameter, module.weight)


def _tables(model: nn.Module) -> set[nn.Parameter]:
    """Lookup tables of tokens, positions and the like."""
    tables = (module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    return {cast(nn.Parameter, weight) for weight in tables}
