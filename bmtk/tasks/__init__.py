"""Tasks: how rows become batches and outputs become metrics.  One file each; recipes know them only through TASKS."""

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from bmtk.errors import UserError

if TYPE_CHECKING:
    from .task import Task


class TasksByName(Mapping[str, "Task"]):
    """The task that a file of this name defines, imported when it is asked for: each needs other libraries."""

    names = (
        "audio_classification",
        "causal_lm",
        "denoising",
        "image_classification",
        "image_text_contrastive",
        "masked_image_modeling",
        "masked_lm",
        "object_detection",
        "question_answering",
        "sequence_classification",
        "speech_recognition",
        "time_series_forecasting",
        "token_classification",
        "translation",
    )

    def __getitem__(self, name: str) -> "Task":
        if name not in self.names:
            raise KeyError(name)
        task: Task = importlib.import_module(f".{name}", __name__).TASK
        return task

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


TASKS = TasksByName()


def task_named(name: object) -> "Task":
    """The task of this name.  Raises: as `check_task`."""
    return TASKS[check_task(name)]


def check_task(name: object) -> str:
    """The name of a task.  Raises: UserError that lists the tasks there are."""
    if name not in TASKS.names:
        raise UserError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    return str(name)
