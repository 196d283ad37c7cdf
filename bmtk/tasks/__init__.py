"""Tasks: how rows become batches and outputs become metrics.  One file each; recipes know them only through TASKS."""

from bmtk.errors import UserError

from . import (
    audio_classification,
    causal_lm,
    denoising,
    image_classification,
    image_text_contrastive,
    masked_image_modeling,
    masked_lm,
    object_detection,
    question_answering,
    sequence_classification,
    speech_recognition,
    time_series_forecasting,
    token_classification,
    translation,
)
from .task import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        audio_classification,
        causal_lm,
        denoising,
        image_classification,
        image_text_contrastive,
        masked_image_modeling,
        masked_lm,
        object_detection,
        question_answering,
        sequence_classification,
        speech_recognition,
        time_series_forecasting,
        token_classification,
        translation,
    )
}


def task_named(name: object) -> Task:
    """The task of this name.  Raises: UserError that lists the tasks there are."""
    if name not in TASKS:
        raise UserError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[str(name)]
