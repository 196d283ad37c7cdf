"""Labels, whatever they are of: their names, their order in a model, and the loss of a batch.  B rows, K labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset

from bmtk.data.columns import cells
from bmtk.data.labels import in_order, some
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .label_types import LabelType, OneLabel
from .task_data import DataArguments


@dataclass
class ClassificationArguments(DataArguments):
    """Which labels, and how a wrong one counts in training."""

    label_column: str = fact("label", "column of the label")
    label_names: list[str] | None = fact(None, "names of the integer labels 0, 1, ... in that order")
    loss: str | None = setting(
        None,
        "training loss; of labels: cross_entropy (the default; binary if a row has several labels), or focal (rows "
        "that are right count less); of numbers: mse (the default), mae, or huber (squared up to an error of 1)",
    )
    focal_gamma: float = setting(
        2.0, "of loss focal: a row's loss counts (1 - probability of its label) to this power"
    )
    class_weights: list[str] | None = fact(
        None,
        "factor of each label in the training loss, in order; balanced: by how rare a label is",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.focal_gamma < 0:
            raise UserError(f"focal_gamma={self.focal_gamma} must be at least 0")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        """Not `threshold`, by which a model may be the better one."""
        names = ("label_column", "label_separator", "problem_type")
        return {**super().settings_that_change(metric), **dict.fromkeys(names, "decides what the right labels are")}


class Labels:
    """The labels of a data set: what kind they are, and their names."""

    def __init__(self, args: Any, kind: LabelType | None = None):
        """`kind` is None where the rows or the model decide it, with `decide`."""
        self.args, self._kind = args, kind
        self.names: list[str] = [name.strip() for name in args.label_names or []]

    @property
    def kind(self) -> LabelType:
        """One label, as long as nothing else is decided."""
        return self._kind or OneLabel(self.args)

    @property
    def is_decided(self) -> bool:
        return self._kind is not None

    def decide(self, kind: type[LabelType]) -> None:
        """Raises: UserError for settings that have no meaning for this kind of labels."""
        self._kind = kind(self.args)

    def find_names(self, rows: Mapping[str, Dataset]) -> None:
        """The names in column "label" of the training rows; of all rows, if none are for training."""
        if self.names:
            return
        sources = [rows["train"]] if "train" in rows else rows.values()
        self.names = in_order({name for split in sources for name in self.kind.names_in(cells(split, "label"))})
        if "train" in rows and len(self.names) < self.kind.min_labels:
            found = repr(self.names[0]) if self.names else "no label"
            raise UserError(f"label_column={self.args.label_column!r} holds {found} in all training rows")

    def bind(self, config: Any, rows: Mapping[str, Dataset], known: Sequence[str]) -> "LabelSet":
        """Write the labels into `config`.

        A classifier that knows the labels of the data (`known`), by name or by number, keeps its own order of them.
        Raises: UserError if a validation or test label is unknown.
        """
        found = {name for split in rows.values() for name in self.kind.names_in(cells(split, "label"))}
        names, ids = self.kind.agreed_labels(found, known, self.names, is_trained="train" in rows)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.problem_type = self.kind.name
        self.kind.labels = names
        return LabelSet(self.kind, names, ids)


@dataclass(frozen=True)
class LabelSet:
    """The labels that a model gives: `names` in its order; `ids` of the names that a column may hold."""

    kind: LabelType
    names: list[str]
    ids: dict[str, int]

    def targets(self, labels: Sequence[Any], where: str) -> list[Any]:
        """What the labels of each row are in a batch.  Raises: as `check`."""
        self.check(labels, where)
        return self.kind.targets(labels, self.ids)

    def check(self, labels: Sequence[Any], where: str) -> None:
        """Raise UserError for a label that the model does not know."""
        unknown = set(self.kind.names_in(labels)) - set(self.ids)
        if unknown:
            rows = enumerate(labels, 1)
            first = next(row for row, label in rows if not unknown.isdisjoint(self.kind.names_in([label])))
            raise UserError(
                f"the {where} data has labels that the training data does not have: {some(unknown)} (first in row "
                f"{first}); known are {some(self.ids)}"
            )

    def criterion(
        self, outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """The losses of a batch, summed over its items; the mean of them where a model trains several readers.

        Computed here because most classifiers of transformers accept `num_items_in_batch` and drop it: their loss and
        gradients grow with gradient accumulation.
        """
        # In float32: under bf16 autocast a log-softmax over rounded logits loses digits that the gradient needs.
        readers = outputs.get("reader_logits") or (outputs["logits"],)
        loss_of = partial(self.kind.criterion, label_smoothing=label_smoothing)
        losses = [loss_of(logits.float(), batch["labels"]) for logits in readers]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)


def labels_of(config: Any, auto_class: str) -> list[str]:
    """The labels that a trained classifier knows, in its order; none for other models, or if it has only numbers."""
    head = auto_class.removeprefix("AutoModel")  # how the class of a model that has this head ends
    if not any(name.endswith(head) for name in config.architectures or ()):
        return []
    names = [config.id2label[index] for index in range(config.num_labels)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names


def one_label(args: Any) -> Labels:
    """Labels of which an item has exactly one."""
    return Labels(args, OneLabel(args))
