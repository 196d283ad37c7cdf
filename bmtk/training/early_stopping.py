"""When a run ends early: decided in one place for the project's own loop and for Trainer."""

import math


def is_better(value: float, best: float | None, *, lower: bool) -> bool:
    """Whether `value` is better than the `best` one so far (None: there is none); nan never is.

    lower: a lower value is better.
    """
    former = best if best is not None else math.inf if lower else -math.inf
    return value < former if lower else value > former


def is_exhausted(patience: int, evaluations: int) -> bool:
    """Whether the run ends after `evaluations` without a better one; never where `patience` is 0."""
    return 0 < patience <= evaluations
