"""Tasks: how rows become batches and outputs become metrics.  One file each; recipes know them only through TASKS."""

from bmtk.errors import UserError

from . import (
    audio_classification,
    image_classification,
    sequence_classification,
    time_series_forecasting,
)
from .task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        audio_classification,
        image_classification,
        sequence_classification,
        time_series_forecasting,
    )
}


def task_named(name: object) -> Task:
    """The task of this name.  Raises: UserError that lists the tasks there are."""
    if name not in TASKS:
        raise UserError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[str(name)]
