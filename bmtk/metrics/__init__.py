"""Metrics: functions of predictions and references, independent of models and tasks, and also modules of evaluate."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .metric import BmtkMetric


def load(name: str, **options: Any) -> "BmtkMetric":
    """The metric of this name: `compute(predictions=..., references=...)`, after any number of `add_batch`.

    `options` are those of evaluate's modules (process_id, num_process, experiment_id).
    Raises: UserError that lists the known metrics.
    """
    from .metric import BmtkMetric  # evaluate takes a second to import, and no task needs it

    return BmtkMetric(config_name=name, **options)
