"""An exponential moving average of the weights: what is evaluated and saved while the raw weights go on learning.

Source: Polyak & Juditsky 1992 (averaging); the warm-up of the decay is that of TensorFlow's ExponentialMovingAverage.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from bmtk.errors import UserError

from .tensor_files import opened

AVERAGES = "averages"  # stem of the state's files in a checkpoint
NUM_UPDATES = "num_updates"  # beside the averages in a state


class WeightAverage:
    """The average of trained weights: average <- d average + (1 - d) weights, with d = min(decay, (1 + t) / (10 + t)).

    t counts the updates, so that the initial weights soon lose their influence.  Averages are kept in
    float32 at least.  Buffers are not averaged: a BatchNorm's statistics are those that the raw weights' maps gave.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], decay: float):
        """`names` of the parameters that are trained; they must already be on their device."""
        self.names, self.decay = dict(names), decay
        self.averages = {p: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.names}
        self.num_updates = torch.zeros((), dtype=torch.int64, device=next(iter(self.averages)).device)

    @torch.no_grad()
    def update(self, *, unless: torch.Tensor | bool = False) -> None:
        """Add the weights after one more update, `unless` it was not applied; a tensor is not read by the host."""
        applied = ~unless if isinstance(unless, torch.Tensor) else not unless
        self.num_updates += applied
        t = self.num_updates.double()
        weight = (1 - ((1 + t) / (10 + t)).clamp(max=self.decay)) * applied
        for parameter, average in self.averages.items():
            average.lerp_(parameter.to(average.dtype), weight.to(average.dtype))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model while the body runs, and its own weights again afterwards."""
        raw = [parameter.detach().clone() for parameter in self.averages]
        self.apply()
        try:
            yield
        finally:
            _copy(self.averages, raw)

    def apply(self) -> None:
        """Put the averages into the model, for good."""
        _copy(self.averages, self.averages.values())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """{parameter name: average}, and the number of updates."""
        averages = {self.names[parameter]: average.contiguous() for parameter, average in self.averages.items()}
        return {**averages, NUM_UPDATES: self.num_updates}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a state made by `state_dict`.  Raises: UserError if it is another model's."""
        if state.keys() != self.state_dict().keys():
            others = sorted(state.keys() ^ self.state_dict().keys())
            raise UserError(
                f"the averaged weights are those of another model: {', '.join(others[:3])}; resume with the model "
                "that was saved"
            )
        self.num_updates.copy_(state[NUM_UPDATES])
        for parameter, average in self.averages.items():
            average.copy_(state[self.names[parameter]])

    def save(self, folder: Path) -> None:
        """Write the state into the folder of a checkpoint."""
        save_file(self.state_dict(), folder / f"{AVERAGES}.safetensors")

    def load(self, folder: Path) -> None:
        """Take over the state in the folder of a checkpoint."""
        like = {self.names[parameter]: average for parameter, average in self.averages.items()}
        with opened(folder, AVERAGES) as files:
            self.load_state_dict({name: files.read(name, like=like.get(name)) for name in files})


@torch.no_grad()
def _copy(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)  # in place: a recurrent layer on a GPU has all its weights in one piece of memory
