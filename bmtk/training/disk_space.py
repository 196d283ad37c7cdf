"""Whether the checkpoints of a run have room on its disk: known before the first step, and again before each save."""

import logging
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from bmtk.errors import UserError

from .adapters import is_adapted
from .agreement import together
from .arguments import LoopArguments
from .manifest import free_bytes
from .prepared import Prepared
from .resume import checkpoints_of

logger = logging.getLogger(__name__)

# Optimizer -> how many tensors of a weight's size it keeps for each, at least (Muon: 1 for a matrix, 2 for others).
# Trainer has some forty more, such as those of 8 bits and Adafactor, of which the weights alone are counted.
STATES = {"adamw": 2, "adamw_torch": 2, "adamw_torch_fused": 2, "adamw_apex_fused": 2, "muon": 1, "sgd": 0}


class SavingArguments(Protocol):
    """What is read of LoopArguments and FineTuningArguments."""

    output_dir: Any
    save_total_limit: Any  # newest checkpoints to keep; 0 or None: all
    early_stopping_patience: int
    ema_decay: float
    sgd_momentum: float


def checkpoint_bytes(model: nn.Module, state: Mapping[Any, Any], *, has_average: bool = False) -> int:
    """About how much a checkpoint takes on the disk: saved weights, an optimizer's `state` by parameter, the average.

    Tokenizer, code and counters are small beside these.
    """
    tensors = (value for values in state.values() for value in values.values())
    kept = _num_bytes(value for value in tensors if isinstance(value, torch.Tensor))
    return _saved_bytes(model) + kept + has_average * _trained_bytes(model)


def expected_bytes(model: nn.Module, args: SavingArguments) -> int:
    """The same before the first step, of the optimizer that `args` name; where it is not known, without its state."""
    name = getattr(args, "optimizer", None) or str(getattr(args, "optim", "")).rpartition(".")[2].lower()
    num_states = STATES.get(name, 0) + (name == "sgd" and args.sgd_momentum > 0)
    return _saved_bytes(model) + (num_states + (args.ema_decay > 0)) * _trained_bytes(model)


def _saved_bytes(model: nn.Module) -> int:
    """Of the weights; of an adapter without its base."""
    return _trained_bytes(model) if is_adapted(model) else _num_bytes({*model.parameters(), *model.buffers()})


def _trained_bytes(model: nn.Module) -> int:
    return _num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check_room(args: SavingArguments, model: nn.Module, *, saves: int, folder: Path | None = None) -> None:
    """Compare the free space with the checkpoints that are to come, before the first step; only the main process does.

    saves: how many the run still makes; 0: nothing is checked.  folder: that of the run, if it is not output_dir.
    Where all checkpoints that are kept at a time, and the one that is written beside them, do not fit, a warning says
    so.

    Raises: UserError if not even one fits.
    """
    folder = Path(folder or args.output_dir)
    num_bytes, free = expected_bytes(model, args), free_bytes(folder)
    if saves < 1:
        return
    if num_bytes > free:
        raise UserError(
            f"output_dir={str(folder)!r}: a checkpoint takes about {_shown(num_bytes)}, and {_shown(free)} are free, "
            "so none could be saved; make room, or choose an output_dir on another disk"
        )
    keep = args.save_total_limit or 0
    there = len(checkpoints_of(folder))
    has_best = args.early_stopping_patience or getattr(args, "load_best_model_at_end", False)
    at_once = min(saves, max(1, keep + 1 + bool(has_best) - there)) if keep else saves
    if at_once * num_bytes > free:
        logger.warning(
            "output_dir=%r: %d checkpoints of about %s are to come (save_total_limit=%d, and one that is being "
            "written), and %s are free; the run ends when the disk is full, with its older checkpoints whole: make "
            "room, lower save_total_limit, or save less often",
            str(folder),
            at_once,
            _shown(num_bytes),
            keep,
            _shown(free),
        )


def check_room_together(prepared: Prepared, args: LoopArguments, *, step: int, total: int) -> None:
    """`check_room` for the steps that are left of the project's own loop; all processes call it, and stop together."""
    is_main = prepared.accelerator.is_main_process
    saves = saves_to_come(args.save_steps, step=step, total=total) if is_main else 0
    together(prepared.accelerator, partial(check_room, args, prepared.unwrapped, saves=saves))


def saves_to_come(every: float, *, step: int, total: int) -> int:
    """How many checkpoints are written after `step`: one each `every` steps (0: none) and one at the end."""
    if step >= total:
        return 0
    return math.ceil(total / every) - math.floor(step / every) if every else 1


def _shown(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
