"""In what two runs differ that are to be the same: history, checkpoints, weights; to the bit, or within bounds."""

import filecmp
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from bmtk.training.history import History
from bmtk.training.resume import checkpoints_of, step_of

# What a clock measures, and how often fp16 has skipped a step since a process was started.
NOT_COMPARED = ("seconds", "mfu", "num_overflows")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm, which each process has of its own
FINAL = math.inf  # the "step" of the final model


@dataclass(frozen=True)
class Difference:
    """The first place where two runs are not the same."""

    step: float
    what: str

    def __str__(self) -> str:
        return f"final model: {self.what}" if self.step == FINAL else f"step {self.step:.0f}: {self.what}"


# To the bit ----------------------------------------------------------------------------------------------------------


def first_difference(one: Path, other: Path) -> Difference | None:
    """The earliest difference of two run folders; None if history, common checkpoints and final weights are equal."""
    found = [*_history_differences(one, other), *_checkpoint_differences(one, other)]
    if found:
        return min(found, key=lambda difference: difference.step)
    what = next(tensor_differences(one, other, one.glob("*.safetensors"), other.glob("*.safetensors")), None)
    return Difference(FINAL, what) if what else None


def history_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of history.jsonl without what differs from one run to the next in any case."""

    def is_compared(key: str) -> bool:
        return key not in NOT_COMPARED and not key.endswith("_per_second")

    return [{key: line[key] for key in line if is_compared(key)} for line in History(folder).read()]


def _history_differences(one: Path, other: Path) -> Iterator[Difference]:
    ended: dict[str, Any] = {"step": FINAL}
    for first, second in zip_longest(history_lines(one), history_lines(other), fillvalue=ended):
        if first == second:
            continue
        step = min(first["step"], second["step"])
        if first["step"] != second["step"]:
            owner = "first" if first["step"] == step else "second"
            yield Difference(step, f"history.jsonl: only the {owner} run has this line")
            return
        key = next(key for key in {**first, **second} if first.get(key) != second.get(key))
        yield Difference(step, f"history.jsonl: {key} {_apart(first.get(key), second.get(key))}")
        return


def _apart(one: Any, other: Any) -> str:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return f"is {one!r} and {other!r}, {abs(one - other):.3g} apart"
    return f"is {one!r} and {other!r}"


def _checkpoint_differences(one: Path, other: Path) -> Iterator[Difference]:
    theirs = {path.name: path for path in checkpoints_of(other)}
    for folder in (path for path in checkpoints_of(one) if path.name in theirs):
        second = theirs[folder.name]
        files = (each.rglob("*.safetensors") for each in (folder, second))
        what = next(tensor_differences(folder, second, *files), None) or _optimizer_difference(folder, second)
        if what:
            yield Difference(step_of(folder), f"{folder.relative_to(one)}/{what}")
            return


def tensor_differences(one: Path, other: Path, files: Iterable[Path], others: Iterable[Path]) -> Iterator[str]:
    """In which tensors two sets of safetensors files differ, as "FILE: TENSOR ..."."""
    ours = {path.relative_to(one): path for path in files}
    theirs = {path.relative_to(other): path for path in others}
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield f"{name}: only the {'first' if name in ours else 'second'} run has this file"
        elif not filecmp.cmp(ours[name], theirs[name], shallow=False):
            wrong = next(different_tensors(Tensors([ours[name]]), Tensors([theirs[name]])), None)
            yield f"{name}: {wrong or 'the same tensors, in files of different bytes'}"


def _optimizer_difference(one: Path, other: Path) -> str | None:
    """The same for the state of torch's optimizers, which Trainer saves by torch.save."""
    paths = [folder / "optimizer.pt" for folder in (one, other)]
    if not all(path.is_file() for path in paths):
        return None
    ours, theirs = (dict(flat(torch.load(path, map_location="cpu", weights_only=True))) for path in paths)
    wrong = next(different_tensors(ours, theirs), None)
    return f"optimizer.pt: {wrong}" if wrong else None


def flat(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) for each tensor in nested dictionaries and lists; numbers are tensors, too."""
    nested = dict(enumerate(state)) if isinstance(state, list | tuple) else state if isinstance(state, Mapping) else {}
    for key, value in nested.items():
        yield from flat(value, f"{name}/{key}" if name else str(key))
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, int | float):
        yield name, torch.tensor(state, dtype=torch.float64)


def different_tensors(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The tensors that are not bit for bit the same, each with the size of its difference."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield f"only the {'first' if name in ours else 'second'} run has {name}"
            continue
        one, other = ours[name], theirs[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            yield f"{name} is {tuple(one.shape)} {one.dtype} and {tuple(other.shape)} {other.dtype}"
        elif _bits(one) != _bits(other):
            yield f"{name} differs by up to {(one.double() - other.double()).abs().max():.3g}"


def _bits(tensor: torch.Tensor) -> bytes:
    """Its content: nan is equal to itself, and 0.0 is not -0.0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Tensors(Mapping[str, torch.Tensor]):
    """The tensors of safetensors files by name, each read when it is asked for."""

    def __init__(self, paths: Iterable[Path]):
        self.files = [safe_open(path, "pt") for path in sorted(paths)]
        self.owners = {name: file for file in self.files for name in cast(Any, file).keys()}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = cast(Any, self.owners[name]).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


# Within bounds -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """The largest relative differences that two runs may have."""

    loss: float
    grad_norm: float
    weights: float  # L2 norm of the difference of all weights, over that of the weights


@dataclass
class Comparison:
    """The largest relative differences of two runs, and the first that is out of bounds."""

    loss: float = 0.0
    grad_norm: float = 0.0
    weights: float = 0.0
    num_steps: int = 0  # that both have logged
    left_out: list[str] = field(default_factory=list)  # statistics of BatchNorm
    first: Difference | None = None

    def note(self, name: str, value: float, bounds: Bounds, *, step: float, what: str) -> None:
        """Take note of a relative difference.  One that is not a number is out of bounds."""
        vars(self)[name] = max(vars(self)[name], value) if not math.isnan(value) else math.nan
        if not value <= vars(bounds)[name] and self.first is None:
            bound = vars(bounds)[name]
            self.first = Difference(step, f"{what}, {value:.2g} relative; {bound:.0e} is allowed")


def compare(one: Path, other: Path, bounds: Bounds) -> Comparison:
    """Compare losses and gradient norms step by step, then the final weights, of two run folders."""
    found = Comparison()
    first, second = (
        {line["step"]: line for line in history_lines(folder) if "loss" in line} for folder in (one, other)
    )
    for step in sorted(first.keys() | second.keys()):
        if step not in first or step not in second:
            found.first = found.first or Difference(step, "only one of the runs has logged this step")
            continue
        found.num_steps += 1
        for name in ("loss", "grad_norm"):
            here, there = first[step].get(name), second[step].get(name)
            what = f"{name} is {here!r} and {there!r}"
            found.note(name, relative(here, there), bounds, step=step, what=what)
    _compare_weights(found, one, other, bounds)
    return found


def relative(one: float | None, other: float | None) -> float:
    """The difference of two numbers, relative to the larger one; nan if one of them is missing or not finite."""
    if one is None or other is None or not math.isfinite(one + other):
        return 0.0 if one is other is None else math.nan
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0


def _compare_weights(found: Comparison, one: Path, other: Path, bounds: Bounds) -> None:
    ours, theirs = (Tensors(folder.glob("*.safetensors")) for folder in (one, other))
    if odd := sorted(ours.keys() ^ theirs.keys()) or [n for n in ours if ours[n].shape != theirs[n].shape]:
        found.first = found.first or Difference(FINAL, f"the runs have other weights: {', '.join(odd[:3])}")
        return
    difference, size, worst = 0.0, 0.0, (0.0, "")
    for name in ours:
        if name.endswith(STATISTICS):
            found.left_out.append(name)
            continue
        here, there = ours[name].double(), theirs[name].double()
        squares = float((here - there).square().sum())
        difference, size = difference + squares, size + float(here.square().sum())
        worst = max(worst, (squares, name))
    value = math.sqrt(difference / size) if size else math.nan
    found.note("weights", value, bounds, step=FINAL, what=f"the weights are apart, {worst[1]} most")
