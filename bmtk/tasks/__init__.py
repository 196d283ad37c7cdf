"""Tasks: how rows become batches and outputs become metrics.  One file each; recipes know them only through TASKS."""

from .audio_classification import AudioClassification
from .causal_lm import CausalLM
from .image_classification import ImageClassification
from .sequence_classification import SequenceClassification
from .task import Task
from .translation import Translation

TASKS = {
    "audio_classification": AudioClassification,
    "causal_lm": CausalLM,
    "image_classification": ImageClassification,
    "sequence_classification": SequenceClassification,
    "translation": Translation,
}


def task_named(name: object) -> type:
    """The class of a task.  Raises: ValueError that lists the tasks there are."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def finetuning_task(name: object) -> type:
    """The class of a task that `recipes/finetune.py` and `recipes/evaluate.py` serve.  Raises: ValueError likewise."""
    served = [other for other, task_class in TASKS.items() if issubclass(task_class, Task)]
    if task_named(name) and name not in served:
        raise ValueError(f"task={name!r} belongs to recipes/pretrain.py; this recipe knows {', '.join(served)}")
    return TASKS[name]
