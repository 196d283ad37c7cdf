"""Hyper-parameter search: a recipe run many times with different values, each time in a process of its own."""

from typing import Any


def search_settings(*settings: Any, **options: Any) -> None:
    """As `study.search_settings`, whose libraries (optuna, and those of both recipes) a run without a search lacks."""
    from .study import search_settings as search

    search(*settings, **options)
