"""What is said of a whole row, whatever the row is: a label, several, or a number.  B rows, K labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import ClassLabel, Dataset

from bmtk.data.tables import check_column
from bmtk.settings import setting

from .classification import Classification, ClassificationArguments, labels_of
from .label_types import LABEL_TYPES, Numbers, OneLabel, SeveralLabels
from .task import Prediction, mean_loss, spread_and_worst

NOTED = {SeveralLabels: "several labels a row", Numbers: "numbers with fractions"}


@dataclass
class RowClassificationArguments(ClassificationArguments):
    """What a row's label is."""

    problem_type: str | None = setting(
        None,
        f"{', '.join(LABEL_TYPES)}; default: several labels where cells are lists, numbers where some have a fraction",
    )
    label_separator: str | None = setting(None, "what stands between the labels of a row, where they are one text")
    threshold: float = setting(0.5, "probability from which on one of several labels is given")

    def __post_init__(self):
        super().__post_init__()
        if self.problem_type not in (None, *LABEL_TYPES):
            raise ValueError(f"problem_type={self.problem_type!r} is unknown; choose one of {', '.join(LABEL_TYPES)}")
        if self.label_separator == "":
            raise ValueError("label_separator='' separates nothing; name what stands between two labels, such as '|'")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} is not a probability; choose between 0 and 1")


class RowClassification(Classification):
    """A row becomes `labels`, and a prediction says them."""

    main_metric = "accuracy"

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("loss", *self.problem.metrics)

    @classmethod
    def metric_of(cls, args: RowClassificationArguments, **reading: object) -> str:
        if args.problem_type:
            return LABEL_TYPES[args.problem_type].main_metric
        return cls(args, **{**reading, "splits": ("train",)}).main_metric

    # ------------------------------------------------------------------------------------------------ labels

    def read_labels(self, table: Dataset, where: str) -> list | None:
        """What each row's label says (a name, names or a number); None if all of them are secret."""
        name = self.args.label_column
        check_column(table, name, option="label_column", where=where)
        kind, values = table.features[name], list(table[name])
        if isinstance(kind, ClassLabel) and set(values) == {-1}:  # how the Hub marks secret labels
            self.notes.append(f"the {where} rows have no labels and are not used")
            return None
        values = [in_words(value, kind) for value in values]
        if self.problem is None:
            seen = label_type_seen_in(values, self.args.label_separator)
            self._decide(LABEL_TYPES.get(self.args.problem_type, seen))
            if self.args.problem_type is None and seen in NOTED:
                self.notes.append(f"label_column={name!r} holds {NOTED[seen]}: problem_type={seen.name}")
        place = f"label_column={name!r} of {where} row"
        return [
            self.problem.value(value, self.args.label_names, f"{place} {row}") for row, value in enumerate(values, 1)
        ]

    def _decide(self, problem: type) -> None:
        self.problem = problem(self.args)
        self.main_metric, self.about = problem.main_metric, {**self.about, **problem.about}

    @property
    def settled(self) -> dict[str, object]:
        return {**super().settled, "problem_type": self.problem.name}

    def prepare(self) -> None:
        if self.problem is None and self.args.problem_type:  # no row has been read
            self._decide(LABEL_TYPES[self.args.problem_type])
        super().prepare()

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Raises: ValueError also if a finished model is for another kind of problem than the rows."""
        is_known = labels_of(config, self.about["auto_class"]) and not labels  # `labels` are an adapter's
        of_model = label_type_of(config) if is_known else None
        if not self.rows:
            self._decide(LABEL_TYPES.get(self.args.problem_type, of_model or OneLabel))
        elif "train" not in self.rows and of_model not in (None, type(self.problem)):
            raise ValueError(
                f"the model is for {of_model.name}, and label_column={self.args.label_column!r} is read for "
                f"{self.problem.name}; set problem_type={of_model.name}, or choose another column"
            )
        super().configure(config, labels=labels)

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Rows, or of several labels each row's every label."""
        return self.problem.num_items(batch["labels"])

    # ------------------------------------------------------------------------------------------------ results

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        logits = model(**self.inputs_of(batch))["logits"].float()
        predictions = self.problem.predictions(logits)
        if "labels" in batch:
            losses, truths = self.problem.reported(logits, batch["labels"]).tolist(), batch["labels"].tolist()
            items = self.problem.num_items(batch["labels"][:1])
            for prediction, loss, truth in zip(predictions, losses, truths, strict=True):
                prediction |= {"loss": loss, "items": items, "truth": truth}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows=None) -> dict[str, float]:
        return {"loss": mean_loss(predictions), **self.problem.score(predictions)}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return self.problem.describe(prediction)

    def samples(self, predictions: Sequence[Prediction], rows, count: int = 4) -> list[dict[str, str]]:
        return [
            {"prompt": self.shown(rows, row), "text": self.verdict(predictions[row])}
            for row in spread_and_worst(predictions, count)
        ]

    def shown(self, rows, row: int) -> str:
        """A row in words."""
        return f"row {row + 1}"

    def verdict(self, prediction: Prediction) -> str:
        said, truth = self.problem.said_and_truth(prediction)
        return f" -> {said}" if said == truth else f" -> {said} (labelled {truth})"

    def figures(self, predictions: Sequence[Prediction], rows) -> list[dict[str, str]]:
        return self.problem.figures(predictions)

    def table(self, predictions: Sequence[Prediction], rows=None) -> str:
        return self.problem.table(predictions)


def in_words(value: object, kind: object) -> object:
    """A cell, or list of cells, whose numbers stand for the names of a ClassLabel; missing ones are None."""
    if isinstance(value, list):
        return [in_words(item, kind.feature) for item in value]
    if not isinstance(kind, ClassLabel):
        return value
    return kind.names[value] if value is not None and value >= 0 else None


def label_type_seen_in(values: Sequence, separator: str | None) -> type:
    """What a column is about: lists, or texts with a separator, hold several labels; fractions are numbers."""
    if separator is not None or any(isinstance(value, list) for value in values):
        return SeveralLabels
    try:
        numbers = [float(value) for value in values if value not in (None, "")]
    except (TypeError, ValueError):
        return OneLabel
    return OneLabel if all(number.is_integer() or number != number for number in numbers) else Numbers


def label_type_of(config) -> type:
    """What a trained classifier is about; without a problem_type, one output is a number, as transformers has it."""
    return LABEL_TYPES.get(config.problem_type, Numbers if config.num_labels == 1 else OneLabel)
