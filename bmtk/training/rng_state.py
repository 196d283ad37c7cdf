"""The random number generators of one process, as tensors of fixed shape.

Fixed shapes let the states of all processes be gathered and stored as plain tensors, without pickle.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch


def seed_process(seed: int, rank: int, step: int) -> None:
    """Seed python, numpy and torch; every (seed, rank, step) has its own stream."""
    words = np.random.SeedSequence((seed, rank, step)).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


class RngState(Mapping[str, torch.Tensor]):
    """The states of python's, numpy's, torch's and the current CUDA device's generators, when it was made.

    They become tensors when they are asked for: each step keeps them, and nearly none needs them.
    """

    def __init__(self) -> None:
        self.of_python, self.of_numpy = random.getstate(), cast(tuple[Any, ...], np.random.get_state())
        self.of_torch = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            self.of_torch["cuda"] = torch.cuda.get_rng_state()

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        _, python_words, python_gauss = self.of_python
        _, numpy_words, position, has_gauss, gauss = self.of_numpy
        return {
            "python": torch.from_numpy(np.array(python_words, dtype=np.int64)),  # twice as fast as torch.tensor
            "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
            "numpy": torch.from_numpy(numpy_words.astype(np.int64)),
            "numpy_gauss": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
            **self.of_torch,
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def set_rng_state(state: Mapping[str, torch.Tensor]) -> None:
    """Put the generators into an RngState; a CUDA state is ignored where there is no CUDA device."""
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    position, has_gauss, gauss = state["numpy_gauss"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng_state() -> Iterator[None]:
    """Let the body draw random numbers; afterwards the generators are as they were."""
    state = RngState()
    try:
        yield
    finally:
        set_rng_state(state)
