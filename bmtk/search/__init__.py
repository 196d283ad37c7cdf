"""Hyper-parameter search: a recipe run many times with different values, each time in a process of its own."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .space import SearchArguments
    from .study import SearchedTask


def search_settings(
    args: "SearchArguments",
    settings: Sequence[Any],
    task: "SearchedTask",
    *,
    recipe: str,
    log: Callable[[str], object],
) -> None:
    """As `study.search_settings`, whose libraries (optuna, and those of both recipes) a run without a search lacks."""
    from . import study

    study.search_settings(args, settings, task, recipe=recipe, log=log)
