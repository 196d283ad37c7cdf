"""A task is three things with three lifetimes.  One task is one file; recipes reach it through TASKS only.

    task = task_named("sequence_classification")
    data = task.read(args)              TaskData: rows as they were read, and what they decide (labels, a tokenizer)
    config = data.new_config(...)       or that of a pretrained model
    objective = data.bind(config)       Objective: rows encoded for this configuration, batches and loss
    objective.scorer                    Scorer: predictions, metrics, samples, figures

What is measured is computed from predictions: one for each row, small enough to keep (a label, a text, boxes), never
the logits.  So metrics are over whole splits, whatever the batch size and the number of processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .objective import Objective
    from .scorer import Scorer
    from .task_data import DataArguments, TaskData

Prediction = dict[str, Any]
Criterion = Callable[..., torch.Tensor]  # (outputs, batch, *, label_smoothing) -> the losses of a batch, summed


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is fixed before any row is read, and the classes of the three lifetimes."""

    name: str
    auto_class: type
    # For model card and report: pipeline_tag, auto_class, processor_class, noun, limits, loss_unit (default: nats).
    about: Mapping[str, str | None]
    arguments: type["DataArguments"]
    data: type["TaskData"]
    objective: type["Objective"]
    scorer: type["Scorer"]
    main_metric: str | None = None  # the metric by which models are compared; None: the rows decide
    unit: str = "rows"  # what throughput is counted in
    peft_task_type: str | None = None

    def read(self, args: "DataArguments", **reading: Any) -> "TaskData":
        """Read the rows; `reading` are the keyword arguments of `TaskData`.  Raises: UserError for unusable rows."""
        return self.data(self, args, **reading)

    def main_metric_of(self, args: "DataArguments", **reading: Any) -> str:
        """The metric by which models are compared; the training rows are read if it depends on them."""
        decided = self.main_metric or args.decided_main_metric
        return decided or self.read(args, **{**reading, "splits": ("train",)}).main_metric
