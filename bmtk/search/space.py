"""The search space: `learning_rate=1e-4..1e-2:log`, `num_hidden_layers=2..6`, `hidden_dropout=0,0.1,0.2`."""

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from bmtk.arguments import unknown_key
from bmtk.errors import UserError

SEARCHES = ("optuna",)
GRAMMAR = "NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B,C"
TRUTH = {"true": True, "false": False}


@dataclass
class SearchArguments:
    """Whether the recipe is run once, or many times with different values."""

    _argument_group_name = "search"

    search: str | None = field(
        default=None,
        metadata={"help": "optuna: many trials with other values, the best written to best.yaml"},
    )
    trials: int = field(default=20, metadata={"help": "number of trials, including those before an interruption"})
    search_space: list[str] | None = field(
        default=None,
        metadata={"help": f"{GRAMMAR}; default: learning rates, weight decay and the dropouts above 0"},
    )

    def __post_init__(self) -> None:
        if self.search not in (None, *SEARCHES):
            raise UserError(f"search={self.search!r} is unknown; choose {' or '.join(SEARCHES)}, or leave it out")
        if self.trials < 1:
            raise UserError(f"trials={self.trials} is out of range; give a number of at least 1")
        if self.search_space and not self.search:
            raise UserError("search_space has an effect in a search only; set search to optuna, or leave it out")


def default_space(current: Mapping[str, Any]) -> list[str]:
    """Learning rates around the `current` ones, weight decay, and each dropout above 0."""
    rates = ["learning_rate", *(["muon_learning_rate"] if current.get("optimizer") == "muon" else [])]
    dropouts = [name for name, value in current.items() if "dropout" in name and isinstance(value, float) and value]
    return [
        *(f"{name}={current[name] / 10:g}..{current[name] * 10:g}:log" for name in rates),
        "weight_decay=0..0.3",
        *(f"{name}=0..0.5" for name in dropouts),
    ]


def read_space(
    entries: Sequence[str], types: Mapping[str, type], refused: Mapping[str, str]
) -> dict[str, BaseDistribution]:
    """The distribution of each field that `entries` name.

    `types` are those of all fields; `refused` gives the reason for each field that cannot be searched.
    Raises: UserError that lists all problems of the entries.
    """
    space: dict[str, BaseDistribution] = {}
    problems = []
    for entry in entries:
        name, _, text = (part.strip() for part in str(entry).partition("="))
        try:
            if not text:
                raise UserError(f"{entry!r} is not understood; write {GRAMMAR}")
            if name not in types:
                raise UserError(unknown_key(name, types.keys() - refused.keys()))
            if name in refused:
                raise UserError(f"{name} cannot be searched: it {refused[name]}")
            if name in space:
                raise UserError(f"{name} is named twice")
            space[name] = _distribution(name, text, types[name])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise UserError("search_space does not fit:\n  " + "\n  ".join(problems))
    return space


def _distribution(name: str, text: str, kind: type) -> BaseDistribution:
    if typing.get_origin(kind) is list:
        raise UserError(f"{name} is a list, and a search changes single values only; leave it out")
    first, dots, rest = text.partition("..")
    if not dots:
        return CategoricalDistribution(_choices(name, text, kind))
    if kind not in (int, float):
        raise UserError(f"{name} is not a number, but {text} is a range; list its values: {name}=A,B")
    last, _, scale = rest.partition(":")
    if scale not in ("", "log"):
        raise UserError(f"{name}={text}: {scale!r} is not a scale; write {name}={first}..{last}:log or leave it out")
    low, high = _value(name, first, kind), _value(name, last, kind)
    if not low < high or not math.isfinite(high - low):
        raise UserError(f"{name}={text} is not a range: {low} is not below {high}")
    if scale and low <= 0:
        raise UserError(f"{name}={text} has no logarithm at {low}; start above 0, or leave out :log")
    return (IntDistribution if kind is int else FloatDistribution)(low, high, log=bool(scale))


def _choices(name: str, text: str, kind: type) -> list[Any]:
    choices = [_value(name, word, kind) for word in text.split(",")]
    if len(set(choices)) < 2:
        raise UserError(f"{name}={text} is a single value; name at least two, or a range {name}=LOW..HIGH")
    return list(dict.fromkeys(choices))


def _value(name: str, word: str, kind: type) -> Any:
    word = word.strip()
    try:
        return TRUTH[word.lower()] if kind is bool else kind(word) if kind in (int, float) else word
    except (ValueError, KeyError):
        raise UserError(f"{name}: {word!r} is not of type {kind.__name__}") from None
