"""TEMPORARY, deleted when class Task is split: an old Task as the Objective and Scorer of protocols.py."""

from collections.abc import Mapping, Sequence
from typing import Any


class TaskAsScorer:
    """The scoring half of a configured Task."""

    def __init__(self, task: Any):
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def generated_samples(self, model: Any, *, seed: int) -> list[dict[str, str]]:
        return self._task.written(model, seed=seed)


class TaskAsObjective:
    """A configured Task."""

    def __init__(self, task: Any):
        self._task, self.notes, self.scorer = task, task.notes, TaskAsScorer(task)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    @property
    def keeps_order(self) -> bool:
        return self._task.has_own_order

    def check_micro_batches(self, count: int) -> None:
        self._task.check_parts(count)


class TaskAsData:
    """A Task that has read its rows."""

    def __init__(self, task: Any):
        self._task, self.notes = task, task.notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def new_config(self, model_type: str, chosen: Mapping[str, object], *, preset: str | None = None) -> Any:
        return self._task.new_config(model_type, chosen, preset=preset)

    def bind(self, config: Any, *, labels: Sequence[str] = ()) -> TaskAsObjective:
        self._task.configure(config, labels=labels)
        return TaskAsObjective(self._task)


def read(task_class: Any, data_args: Any, **reading: Any) -> TaskAsData:
    """In place of `task.read(data_args, ...)`."""
    return TaskAsData(task_class(data_args, **reading))
