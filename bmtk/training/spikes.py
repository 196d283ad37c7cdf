"""Which steps spike: those whose loss and gradient norm are both far above what they were lately.

Far is measured in robust standard deviations, 1.4826 times the median distance from the median, over the last steps
that were applied: neither a spike nor a slow drift moves them much.  Only both together make a spike: a gradient norm
alone jumps early in a run, and a loss alone where it is near 0 (test_spikes.py counts both on real curves).
Sources: Leys et al. 2013 (median absolute deviation); `SkipStepOptimizer` of OLMo-core (128 steps, 6 deviations, mean
and standard deviation, either of the two).
"""

import bisect
import math
import operator
from collections.abc import Sequence

import numpy as np
import torch

WINDOW, FEWEST = 128, 64  # steps that are compared with, and how many there have to be
GAUSSIAN = 1.4826  # median absolute deviation -> standard deviation of a normal distribution
SMALLEST = 0.01  # a deviation is at least this part of the median: the loss of some runs hardly moves at all


class SpikeDetector:
    """Compares each step with the ones before.  All of it stays on the device, so that the host need not wait for it.

    `window` (WINDOW, 2) holds loss and gradient norm of the last steps, the newest last; what is empty is infinite.
    """

    def __init__(self, sigma: float, device: torch.device):
        self.sigma = sigma
        self.window = torch.full((WINDOW, 2), math.inf, dtype=torch.float64, device=device)
        self.ordered: tuple[list[float], list[float]] = ([], [])  # what `host_sees_spike` compares with, by size

    def sees_spike(self, loss: torch.Tensor, norm: torch.Tensor, *, bad: torch.Tensor) -> torch.Tensor:
        """Whether a step spikes (0-dim bool); it is compared with later, unless it does or is `bad` anyway."""
        if self.window.device.type == "cpu":
            return torch.tensor(self.host_sees_spike(float(loss), float(norm), bad=bool(bad)))
        return self._device_sees_spike(loss, norm, bad=bad)

    def host_sees_spike(self, loss: float, norm: float, *, bad: bool = False) -> bool:
        """The same with plain numbers, in a tenth of the time: tensors and arrays of two numbers are slow."""
        if bad or not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        step, middles = (loss, norm), [_middle(values) for values in self.ordered]
        least = (middle + self.sigma * (SMALLEST * abs(middle)) for middle in middles)  # a spike is above it
        if len(self.ordered[0]) >= FEWEST and all(map(operator.gt, step, least)) and self._is_far(step, middles):
            return True
        window = self.window.numpy()
        for values, new, oldest in zip(self.ordered, step, window[0].tolist(), strict=True):
            if len(values) == WINDOW:
                del values[bisect.bisect_left(values, oldest)]
            bisect.insort(values, new)
        self.window = torch.from_numpy(np.concatenate((window[1:], [step])))
        return False

    def _is_far(self, step: tuple[float, float], middles: Sequence[float]) -> bool:
        for value, middle, values in zip(step, middles, self.ordered, strict=True):
            deviation = max(GAUSSIAN * _middle(sorted(abs(one - middle) for one in values)), SMALLEST * abs(middle))
            if not value > middle + self.sigma * deviation or not deviation > 0:
                return False
        return True

    def _device_sees_spike(self, loss: torch.Tensor, norm: torch.Tensor, *, bad: torch.Tensor) -> torch.Tensor:
        step = torch.stack([loss.detach().double(), norm.detach().double()])
        middle, deviation = levels(self.window)
        enough = torch.isfinite(self.window[:, 0]).sum() >= FEWEST
        spikes = ((step > middle + self.sigma * deviation) & (deviation > 0)).all() & enough & ~bad
        kept = torch.isfinite(step).all() & ~bad & ~spikes
        self.window = torch.where(kept, torch.cat([self.window[1:], step[None]]), self.window)
        return spikes

    def state(self) -> list[list[float]]:
        """What it compares with, as plain numbers."""
        filled = self.window[torch.isfinite(self.window[:, 0])]
        pairs: list[list[float]] = filled.tolist()
        return pairs

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Take over a state made by `state`."""
        self.window.fill_(math.inf)
        if state:
            self.window[-len(state) :] = torch.tensor(state, dtype=torch.float64)
        self.ordered = (sorted(loss for loss, _ in state), sorted(norm for _, norm in state))


def levels(window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Median and robust standard deviation of the columns of `window` (W, C), (C,) both; infinite rows are empty."""
    count = torch.isfinite(window[:, 0]).sum()
    middle = _median(window, count)
    deviation = GAUSSIAN * _median((window - middle).abs().nan_to_num(math.inf, posinf=math.inf), count)
    return middle, torch.maximum(deviation, SMALLEST * middle.abs())


def _middle(ordered: Sequence[float]) -> float:
    """The median of numbers in order; infinite where there are none."""
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2 if count else math.inf


def _median(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The median of the `count` lowest values of each column, which a number on the host could not index."""
    places = torch.stack([(count - 1).clamp(min=0) // 2, count // 2]).clamp(max=len(values) - 1)
    return values.sort(dim=0).values.index_select(0, places).mean(dim=0)
