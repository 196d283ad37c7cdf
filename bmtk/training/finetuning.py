"""TEMPORARY, deleted when class Task is split: the names that tests/tasks imports, for an old Task."""

from typing import Any

from ._task_adapter import TaskAsData, TaskAsObjective
from .finetuning_arguments import FineTuningArguments, resolve_defaults
from .starting_weights import load_for_task, read_config, starting_config, starting_weights  # noqa: F401
from .trainer import TaskTrainer, lay_out_channels_last  # noqa: F401
from .trainer import build_trainer as build


def starting_model(run: Any, task: Any, chosen: dict[str, object], *, quantize: str | None = None) -> Any:
    data = TaskAsData(task)
    config = starting_config(run, data, chosen)
    return starting_weights(data.bind(config), config, run, quantize=quantize)


def settle(args: FineTuningArguments, task: Any) -> None:
    resolve_defaults(args, TaskAsObjective(task))


def build_trainer(model: Any, task: Any, args: FineTuningArguments, **others: Any) -> TaskTrainer:
    return build(model, TaskAsObjective(task), args, **others)
