"""Labels of whole rows, whatever a row is: one label, several, or a number.  B rows, K labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset

from bmtk.data.columns import cells
from bmtk.data.labels import note_blanks
from bmtk.data.tables import check_column
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .classification import ClassificationArguments, Labels, LabelSet, labels_of
from .label_types import LABEL_TYPES, LabelType, Numbers, OneLabel, SeveralLabels
from .scorer import Scorer, mean_loss, spread_and_worst
from .task import Prediction
from .task_data import TaskData

NOTED = {SeveralLabels: "several labels a row", Numbers: "numbers with fractions"}


@dataclass
class RowClassificationArguments(ClassificationArguments):
    """What a row's label is."""

    problem_type: str | None = fact(
        None,
        f"{', '.join(LABEL_TYPES)}; default: several labels where cells are lists, numbers where some have a fraction",
    )
    label_separator: str | None = fact(None, "what stands between the labels of a row, where they are one text")
    threshold: float = setting(0.5, "of several labels, those with at least this probability are predicted")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type not in (None, *LABEL_TYPES):
            raise UserError(f"problem_type={self.problem_type!r} is unknown; choose one of {', '.join(LABEL_TYPES)}")
        if self.label_separator == "":
            raise UserError("label_separator='' separates nothing; name what stands between two labels, such as '|'")
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold} is not a probability; choose between 0 and 1")

    @property
    def decided_main_metric(self) -> str | None:
        return LABEL_TYPES[self.problem_type].main_metric if self.problem_type else None


class RowLabels(Labels):
    """The label column of a table; its first split decides what kind of labels they are, if the settings do not."""

    def __init__(self, args: RowClassificationArguments):
        super().__init__(args, LABEL_TYPES[args.problem_type](args) if args.problem_type else None)

    def read(self, table: Dataset, where: str, notes: list[str]) -> list[Any] | None:
        """Each row's label (a name, names or a number); None if all of them are secret."""
        name = self.args.label_column
        check_column(table, name, option="label_column", where=where)
        feature, values = table.features[name], list(cells(table, name))
        if isinstance(feature, ClassLabel) and set(values) == {-1}:  # how the Hub marks secret labels
            notes.append(f"the {where} rows have no labels and are not used")
            return None
        values = [in_words(value, feature) for value in values]
        if not self.is_decided:
            self._decide_by(values, notes)
        kind, names = self.kind, self.args.label_names
        if not isinstance(kind, Numbers):
            note_blanks(values, notes, option=f"label_column={name!r}", where=where)
        place = f"label_column={name!r} of {where} row"
        return [kind.value(value, names, f"{place} {row}") for row, value in enumerate(values, 1)]

    def _decide_by(self, values: list[Any], notes: list[str]) -> None:
        seen = label_type_seen_in(values, self.args.label_separator)
        self.decide(seen)
        if seen in NOTED:
            notes.append(f"label_column={self.args.label_column!r} holds {NOTED[seen]}: problem_type={seen.name}")

    def bind_to(self, config: Any, data: TaskData, *, labels: Sequence[str]) -> LabelSet:
        """Write the labels into `config`; `labels` are those of an adapter, whose configuration does not have them.

        Raises: UserError if a finished model is for another kind of label than the rows, or does not know theirs.
        """
        trained = labels_of(config, str(data.task.about["auto_class"]))
        of_model = label_type_of(config) if trained and not labels else None
        if not data.rows:
            self.decide(LABEL_TYPES.get(self.args.problem_type, of_model or OneLabel))
        elif "train" not in data.rows and of_model not in (None, type(self.kind)):
            raise UserError(
                f"the model is for {of_model.name}, and label_column={self.args.label_column!r} is read for "
                f"{self.kind.name}; set problem_type={of_model.name}, or choose another column"
            )
        bound = self.bind(config, data.rows, list(labels) or trained)
        if "train" in data.rows:
            data.notes.append(self.kind.survey(data.rows["train"]["label"][:]))
        return bound


class RowScorer(Scorer):
    """Scores of one label, several, or a number for each row."""

    def __init__(self, objective: Any):
        super().__init__(objective)
        self.labels: LabelSet = objective.labels
        self.kind: LabelType = self.labels.kind

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]  # which they are depends on the labels
        return ("loss", *self.kind.metrics)

    def predict(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> list[Prediction]:
        logits = model(**self.objective.inputs_of(batch))["logits"].float()
        predictions = self.kind.predictions(logits)
        if "labels" in batch:
            losses, truths = self.kind.reported_losses(logits, batch["labels"]).tolist(), batch["labels"].tolist()
            items = self.kind.num_items(batch["labels"][:1])
            for prediction, loss, truth in zip(predictions, losses, truths, strict=True):
                prediction |= {"loss": loss, "items": items, "truth": truth}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: Any = None) -> dict[str, float]:
        return {"loss": mean_loss(predictions), **self.kind.score(predictions)}

    def baselines(self, predictions: Sequence[Prediction], rows: Any = None) -> dict[str, float]:
        return self.kind.baselines(predictions)

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return self.kind.describe(prediction)

    def samples(self, predictions: Sequence[Prediction], rows: Any, count: int = 4) -> list[dict[str, str]]:
        return [
            {"prompt": self.shown(rows, row), "text": self.verdict(predictions[row])}
            for row in spread_and_worst(predictions, count)
        ]

    def shown(self, rows: Any, row: int) -> str:
        """A row in words."""
        return f"row {row + 1}"

    def verdict(self, prediction: Prediction) -> str:
        """What was predicted, and the true label where that is another."""
        predicted, true = self.kind.predicted_and_true(prediction)
        return f" -> {predicted}" if predicted == true else f" -> {predicted} (labelled {true})"

    def figures(self, predictions: Sequence[Prediction], rows: Any) -> list[dict[str, str]]:
        return self.kind.figures(predictions)

    def table(self, predictions: Sequence[Prediction], rows: Any = None) -> str:
        return self.kind.table(predictions)


def in_words(value: Any, feature: Any) -> Any:
    """A cell, or list of cells, whose numbers stand for the names of a ClassLabel; missing ones are None."""
    if isinstance(value, list):
        return [in_words(item, feature.feature) for item in value]
    if not isinstance(feature, ClassLabel):
        return value
    return feature.names[value] if value is not None and value >= 0 else None


def label_type_seen_in(values: Sequence[Any], separator: str | None) -> type[LabelType]:
    """What a column holds: lists, or texts with a separator, are several labels; fractions are numbers."""
    if separator is not None or any(isinstance(value, list) for value in values):
        return SeveralLabels
    try:
        numbers = [float(value) for value in values if value not in (None, "")]
    except (TypeError, ValueError):
        return OneLabel
    return OneLabel if all(number.is_integer() or number != number for number in numbers) else Numbers


def label_type_of(config: Any) -> type[LabelType]:
    """What a trained classifier predicts; without a problem_type, one output is a number, as in transformers."""
    return LABEL_TYPES.get(config.problem_type, Numbers if config.num_labels == 1 else OneLabel)
