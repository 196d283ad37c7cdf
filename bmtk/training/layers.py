"""How deep below the head a weight lies, in any model, and learning rates that fall with the depth."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bmtk.errors import UserError

from .adapters import is_adapted

if TYPE_CHECKING:
    from peft import PeftModel


def depths(model: "PreTrainedModel | PeftModel", *, setting: str) -> dict[nn.Parameter, int]:
    """The depth of each parameter: 0 in the head and behind the layers, 1 in the last of n layers, n + 1 in the stem.

    Layers are the members of a list of modules, the one that holds most weights.  A model of several stacks (encoder
    and decoder, image and text) has such a list in each, and each counts its own.  A table shared with the head is a
    stem's.  Raises: UserError that names the `setting` which needs them if there is no list of layers.
    """
    whole = model.get_base_model() if is_adapted(model) else model
    trunk: Any = whole.base_model
    found = dict.fromkeys(whole.parameters(), 0)
    models: set[nn.Module] = {module for module in trunk.modules() if isinstance(module, PreTrainedModel)}
    stacks = list(_stacks(trunk, {module for module in models if any(_lists(module, models))}))
    if not stacks:
        raise UserError(f"{setting} needs a list of layers (nn.ModuleList), and a {type(whole).__name__} has none")
    for stack in stacks:
        for parameter, depth in _depths_in(stack, apart=set(stacks)):
            found[parameter] = max(found[parameter], depth)
    return found


def _stacks(module: nn.Module, with_lists: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules that hold one of the models `with_lists` each; and such a model that holds others."""
    inside = sum(each in with_lists for each in module.modules())
    if inside == 1 or module in with_lists:
        yield module
    if inside > 1:
        for child in module.children():
            yield from _stacks(child, with_lists)


def _depths_in(stack: nn.Module, apart: set[nn.Module]) -> Iterator[tuple[nn.Parameter, int]]:
    """Depths of what `stack` holds itself, in the order of registration, without what is in stacks `apart`."""
    lists = list(_lists(stack, apart))
    layers = max(lists, key=_num_weights)
    # Lists of one length go side by side: a model may keep the patch embeddings and norms of its stages apart.
    inside = {
        parameter: len(layers) - number
        for members in lists
        if len(members) == len(layers)
        for number, layer in enumerate(members)
        for parameter in layer.parameters()
    }
    is_before = True
    for name, parameter in _parameters(stack, apart):
        is_before &= parameter not in inside
        yield parameter, inside.get(parameter, len(layers) + 1 if is_before or "embed" in name else 0)


def _lists(module: nn.Module, apart: set[nn.Module]) -> Iterator[nn.ModuleList]:
    """The outermost lists of modules with weights, but for those in modules `apart`."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and _num_weights(child):
            yield child
        elif child not in apart:
            yield from _lists(child, apart)


def _parameters(module: nn.Module, apart: set[nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((prefix + name, parameter) for name, parameter in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if child not in apart:
            yield from _parameters(child, apart, f"{prefix}{name}.")


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def decay_rates_by_depth(
    optimizers: Iterable[torch.optim.Optimizer], model: "PreTrainedModel | PeftModel", decay: float
) -> None:
    """`decay_rates` of several optimizers of one model; nothing where `layer_lr_decay` is 1.  Errors: as `depths`."""
    if decay == 1:
        return
    depth = depths(model, setting=f"layer_lr_decay={decay}")
    for optimizer in optimizers:
        decay_rates(optimizer, depth, decay)


def decay_rates(optimizer: torch.optim.Optimizer, depth: Mapping[nn.Parameter, int], decay: float) -> None:
    """Multiply the learning rate of each parameter by decay ** depth; groups are split for it, the head's come first.

    Source: Clark et al. 2020, arXiv:2003.10555, section 3.1; the count of depths: Bao et al. 2021, arXiv:2106.08254.
    """
    split = [
        (
            level,
            {**group, "lr": group["lr"] * decay**level, "params": [p for p in group["params"] if depth[p] == level]},
        )
        for group in optimizer.param_groups
        for level in sorted({depth[parameter] for parameter in group["params"]})
    ]
    optimizer.param_groups[:] = [group for _, group in sorted(split, key=lambda pair: pair[0])]
