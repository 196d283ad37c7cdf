"""What keeps a broken step out of a model, and a broken model out of checkpoints: of both recipes."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

logger = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")  # buffers that a layer learns from its inputs
MANY_TIMES = 1000  # a loss that is larger than its recent level by this factor is a spike
RECENT, FEWEST = 50, 3  # losses that the level is the median of, and how many there have to be


@dataclass
class GuardState:
    """What a run keeps of its steps that were not applied; a part of every checkpoint."""

    skipped: list[int] = field(default_factory=list)  # steps whose update was not finite, or spiked, and not applied
    left_out: list[int] = field(default_factory=list)  # steps in the order of the data that no step takes rows from
    failed_at: int = -1  # steps done before the last row of bad ones that the run went back for; -1: there was none
    recent: list[list[float]] = field(default_factory=list)  # what the next steps are compared with: SpikeDetector


def is_sound(loss: float) -> bool:
    """Whether a loss is finite, and so is its square in float32: gradients of a larger one have no norm there."""
    return loss * loss <= torch.finfo(torch.float32).max


def sound_or_nan(loss: torch.Tensor) -> torch.Tensor:
    """0, or nan where `is_sound` does not hold; of the loss's type, without a gradient, on its device."""
    return (0.0 * loss.detach().float().square()).to(loss.dtype)


def broken_weights(model: nn.Module) -> list[str]:
    """The names of parameters and running statistics that hold a number which is not finite."""
    tensors: Iterator[tuple[str, torch.Tensor]] = iter(model.named_parameters())
    found = [name for name, value in tensors if is_broken(value)]
    return found + [name for name, value in model.named_buffers() if name.endswith(STATISTICS) and is_broken(value)]


def is_broken(value: torch.Tensor) -> bool:
    """Whether a tensor holds a number that is not finite."""
    if not value.is_floating_point():
        return False
    # On a CPU the sum takes an eighth of the time that `isfinite` takes; it may overflow where no number is infinite.
    return not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all())


class SavedBuffers:
    """A copy of the buffers of modules, such as the statistics of BatchNorm, which a forward pass changes.

    A module names those that it never changes as its `constant_buffers`.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        """`modules` are all of a model's: walking through them in every step takes longer than the copies."""
        self.kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in getattr(module, "constant_buffers", ())
        ]

    @torch.no_grad()
    def restore(self, where: torch.Tensor | None = None) -> None:
        """Make the buffers what they were, bit by bit; `where` a 0-dim bool on the device holds, if it is given."""
        for module, name, buffer, former in self.kept:
            now = getattr(module, name)
            buffer.copy_(former if where is None or now is not buffer else torch.where(where, former, buffer))
            setattr(module, name, buffer)


class SpikeWatch:
    """Warns of a loss that is MANY_TIMES its recent level, once until it has come back.

    The level is the median of the absolute values of the last RECENT losses, which a few spikes do not move; at least
    FEWEST of them are needed.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.is_high = False

    def see(self, step: int, loss: float) -> None:
        """Look at the loss of a step that is applied."""
        level = statistics.median(self.recent) if len(self.recent) >= FEWEST else math.inf
        was_high, self.is_high = self.is_high, abs(loss) > MANY_TIMES * level > 0
        if self.is_high and not was_high:
            logger.warning(
                "step %d: the loss is %.4g, and the median of the last %d was %.4g; the step was applied: look at its "
                "rows, or lower learning_rate or max_grad_norm",
                step,
                loss,
                len(self.recent),
                level,
            )
        self.recent.append(abs(loss))
