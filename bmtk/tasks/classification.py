"""Labels, whatever they are of: their names, their order in a model, and the loss of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset

from bmtk.data.labels import in_order, some
from bmtk.settings import setting

from .label_types import LabelType, OneLabel
from .task import DataArguments, Task


@dataclass
class ClassificationArguments(DataArguments):
    """Which labels, and how a wrong one counts in training."""

    label_column: str = setting("label", "column of the label")
    label_names: list[str] | None = setting(None, "names of the integer labels 0, 1, ... in that order")
    loss: str | None = setting(
        None,
        "training loss; of labels: cross_entropy (the default; binary if a row has several labels), or focal (rows "
        "that are right count less); of numbers: mse (the default), mae, or huber (squared up to an error of 1)",
    )
    focal_gamma: float = setting(2.0, "how much less, of loss focal: (1 - probability of the label) to this power")
    class_weights: list[str] | None = setting(
        None,
        "factor of each label in the training loss, in order; balanced: by how rare a label is",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.focal_gamma < 0:
            raise ValueError(f"focal_gamma={self.focal_gamma} must be at least 0")


class Classification(Task):
    """Labels are read by name, and a `problem` says what is made of them."""

    problem: LabelType | None = None  # decided by `read_rows` or `prepare`

    @classmethod
    def incomparable(cls, args: ClassificationArguments, metric: str) -> dict[str, str]:
        """Not `threshold`, by which a model may be the better one."""
        names = ("label_column", "label_separator", "problem_type")
        return {**super().incomparable(args, metric), **dict.fromkeys(names, "decides what the right labels are")}

    # ------------------------------------------------------------------------------------------------ labels

    def prepare(self) -> None:
        """Find the labels: those of the training rows; of all rows, if none are for training."""
        self.problem = self.problem or OneLabel(self.args)
        self.names = self.args.label_names or self._names_in_rows()

    def _names_in_rows(self) -> list[str]:
        sources = [self.rows["train"]] if "train" in self.rows else self.rows.values()
        names = in_order({name for rows in sources for name in self.labels_in(rows)})
        if len(names) < self.problem.fewest and "train" in self.rows:
            held = repr(names[0]) if names else "no label"
            raise ValueError(f"label_column={self.args.label_column!r} holds {held} in all training rows")
        return names

    def labels_in(self, rows: Dataset) -> list[str]:
        """Every label of the rows, by name, as often as it occurs."""
        return self.problem.names_in(rows["label"])

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Write the labels into `config`.

        A classifier that knows the labels of the data, by name or by number, keeps its own order of them.
        Raises: ValueError if a validation or test label is unknown.
        """
        known = list(labels) or labels_of(config, self.about["auto_class"])
        found, is_trained = (
            {name for rows in self.rows.values() for name in self.labels_in(rows)},
            "train" in self.rows,
        )
        self.labels, self.ids = self.problem.agreed_labels(found, known, self.names, is_trained=is_trained)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        config.problem_type = self.problem.name
        self.problem.labels = self.labels
        if is_trained:
            self.notes.append(self.problem.survey(self.rows["train"]["label"][:]))
        super().configure(config)

    def targets(self, labels: Sequence, where: str) -> list:
        """What the labels of each row are in a batch.  Raises: ValueError for one that the model does not know."""
        unknown = set(self.problem.names_in(labels)) - set(self.ids)
        if unknown:
            rows = enumerate(labels, 1)
            first = next(row for row, label in rows if not unknown.isdisjoint(self.problem.names_in([label])))
            raise ValueError(
                f"the {where} data has labels that the training data does not have: {some(unknown)} (first in row "
                f"{first}); known are {some(self.ids)}"
            )
        return self.problem.targets(labels, self.ids)

    def criterion(self, outputs, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0) -> torch.Tensor:
        """The losses of a batch, summed over its items.

        Computed here because most classifiers of transformers accept `num_items_in_batch` and drop it: their loss and
        gradients grow with gradient accumulation.
        """
        return self.problem.criterion(outputs["logits"].float(), batch["labels"], label_smoothing=label_smoothing)

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "labels": self.labels}


def labels_of(config, auto_class: str) -> list[str]:
    """The labels that a trained classifier knows, in its order; none for other models, or if it has only numbers."""
    head = auto_class.removeprefix("AutoModel")  # how the class of a model that has this head ends
    if not any(name.endswith(head) for name in config.architectures or ()):
        return []
    names = [config.id2label[index] for index in range(config.num_labels)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names
