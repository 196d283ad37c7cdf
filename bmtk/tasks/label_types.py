"""What a column of labels holds (`problem_type` of transformers): one label of a row, several, or a number.

A label type knows how a cell is read, what a model is trained towards, and what its logits mean.  B rows, K labels.
The loss that is reported is each label type's own, whatever the training loss is: cross-entropy, binary cross-entropy
(both in nats) or squared error.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from bmtk.data.labels import agreed_labels, label_name, some
from bmtk.errors import UserError
from bmtk.metrics.labels import one_label_scores, scores_by_label, several_labels_scores, top_accuracy
from bmtk.metrics.numbers import regression_scores

from .figures import confusion_matrix, hits_and_misses, truth_and_prediction
from .task import Prediction

TOP = 5  # labels that count as a hit of top5_accuracy
SHOWN = 10  # labels of a note
NOTHING = "nothing"
FAR = 20.0  # from 0, for targets: a head learns an offset by its learning rate in a step
ERRORS: dict[str, Any] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}  # losses of numbers


class LabelType:
    """How labels are read, learned and measured.  A subclass has every method that raises NotImplementedError."""

    name: ClassVar[str]
    main_metric: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]  # to train with, the default first
    min_labels: ClassVar[int]  # among the training rows
    about: ClassVar[dict[str, str | None]] = {}  # what the model card says otherwise than of one label

    def __init__(self, args: Any):
        self.args = args
        self.labels: list[str] = []  # of the model, in its order
        self.weights: torch.Tensor | None = None  # (K,): the factor of each label in the training loss
        self.loss: str = args.loss or self.losses[0]
        if self.loss not in self.losses:
            raise UserError(f"loss={self.loss!r} is not for {self.name}; choose one of {', '.join(self.losses)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `score` measures."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ the column

    def value(self, cell: object, names: Sequence[str] | None, where: str) -> Any:
        """What a cell of the label column holds.  Raises: UserError or ValueError that names `where`."""
        raise NotImplementedError

    def names_in(self, values: Iterable[Any]) -> Iterator[str]:
        """The names of labels in `values`, as often as they occur; a row may have a list of them."""
        raise NotImplementedError

    def agreed_labels(
        self, found: Collection[str], known: Sequence[str], names: Sequence[str], *, is_trained: bool
    ) -> tuple[list[str], dict[str, int]]:
        """As bmtk.data.labels does."""
        raise NotImplementedError

    def survey(self, values: Sequence[Any]) -> str:
        """What the training rows hold, in a sentence; it also sets class weights that follow from it."""
        raise NotImplementedError

    def targets(self, values: Sequence[Any], ids: Mapping[str, int]) -> list[Any]:
        """What a row's labels are in a batch."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ losses

    def num_items(self, labels: torch.Tensor) -> int:
        """How many losses of a batch are summed."""
        return len(labels)

    def criterion(self, logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the training losses."""
        raise NotImplementedError

    def reported_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum (B,) of the losses of each row."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ predictions

    def predictions(self, logits: torch.Tensor) -> list[Prediction]:
        """One for each row of (B, K) logits."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        raise NotImplementedError

    def baselines(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Metrics of the best constant guess for these rows, where there is a simple one."""
        return {}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """In words and plain numbers."""
        raise NotImplementedError

    def predicted_and_true(self, prediction: Prediction) -> tuple[str, str]:
        """The labels of a row in words: those predicted, and its own."""
        raise NotImplementedError

    def is_right(self, prediction: Prediction) -> bool:
        predicted, true = self.predicted_and_true(prediction)
        return predicted == true

    def mistake(self, prediction: Prediction) -> str:
        """Two lines: what was predicted, what is true."""
        predicted, true = self.predicted_and_true(prediction)
        return f"{predicted}\nis {true}"

    def figures(self, predictions: Sequence[Prediction]) -> list[dict[str, str]]:
        raise NotImplementedError

    def table(self, predictions: Sequence[Prediction]) -> str:
        """Details of `score`; empty: none."""
        return ""


class NamedLabels(LabelType):
    """K labels that have names."""

    losses = ("cross_entropy", "focal")

    def names_in(self, values: Iterable[Any]) -> Iterator[str]:
        return (name for value in values for name in ([value] if isinstance(value, str) else value))

    def agreed_labels(
        self, found: Collection[str], known: Sequence[str], names: Sequence[str], *, is_trained: bool
    ) -> tuple[list[str], dict[str, int]]:
        return agreed_labels(found, known, names, is_trained=is_trained)

    def true_and_predicted(self, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
        """Of all rows: ids (N,), or whether a row has each label (N, K)."""
        raise NotImplementedError

    def table(self, predictions: Sequence[Prediction]) -> str:
        """Rows, precision, recall and F1 of each label."""
        scores = scores_by_label(*self.true_and_predicted(predictions))
        return scores_table([{**row, "label": self.labels[int(row["label"])]} for row in scores])


class OneLabel(NamedLabels):
    """Exactly one of K labels."""

    name = "single_label_classification"
    main_metric = "accuracy"
    min_labels = 2

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("accuracy", "macro_f1", *(["top5_accuracy"] if len(self.labels) > TOP else []))

    def value(self, cell: object, names: Sequence[str] | None, where: str) -> str:
        return label_name(cell, names, where)

    def survey(self, values: Sequence[Any]) -> str:
        found = Counter(self.names_in(values))
        self.weights = class_weights(self.args.class_weights, self.labels, [found[name] for name in self.labels])
        return f"training labels: {shares(found, found.total())}"

    def targets(self, values: Sequence[Any], ids: Mapping[str, int]) -> list[Any]:
        return [ids[value] if isinstance(value, str) else [ids[name] for name in value] for value in values]

    def criterion(self, logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the training losses.  Focal loss: Lin et al. 2017, arXiv:1708.02002, over a softmax.

        `labels` are ids (B,), or of mixed rows the share of each label (B, K), for cross-entropy alone.
        """
        losses = F.cross_entropy(
            logits, labels, on_device_of(logits, self.weights), reduction="none", label_smoothing=label_smoothing
        )
        if self.loss == "focal":
            of_label = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
            losses = (1 - of_label) ** self.args.focal_gamma * losses
        return losses.sum()

    def reported_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def predictions(self, logits: torch.Tensor) -> list[Prediction]:
        best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.tolist()
        scores = logits.softmax(-1).amax(-1).tolist()
        return [
            {"label": labels[0], "top": labels, "score": score} for labels, score in zip(best, scores, strict=True)
        ]

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        truth, predicted = self.true_and_predicted(predictions)
        metrics = one_label_scores(truth, predicted)
        if len(predictions[0]["top"]) == TOP and len(self.labels) > TOP:
            metrics["top5_accuracy"] = top_accuracy(truth.tolist(), [p["top"] for p in predictions])
        return metrics

    def baselines(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """The share of the most frequent label of these rows, and macro-F1 where all rows are given that label."""
        truth, _ = self.true_and_predicted(predictions)
        guess = np.full_like(truth, np.bincount(truth).argmax())
        return {f"majority_{name}": value for name, value in one_label_scores(truth, guess).items()}

    def true_and_predicted(self, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([p["truth"] for p in predictions]), np.array([p["label"] for p in predictions])

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": self.labels[prediction["label"]], "score": round(prediction["score"], 6)}

    def predicted_and_true(self, prediction: Prediction) -> tuple[str, str]:
        return self.labels[prediction["label"]], self.labels[prediction["truth"]]

    def mistake(self, prediction: Prediction) -> str:
        """With the probabilities of both."""
        predicted, true = self.predicted_and_true(prediction)
        return f"{predicted} {prediction['score']:.1%}\nis {true} {math.exp(-prediction['loss']):.1%}"

    def figures(self, predictions: Sequence[Prediction]) -> list[dict[str, str]]:
        return [confusion_matrix(*self.true_and_predicted(predictions), self.labels)]


class SeveralLabels(NamedLabels):
    """Any number of K labels, none included: one binary question for each."""

    name = "multi_label_classification"
    main_metric = "micro_f1"
    min_labels = 1
    about: ClassVar[dict[str, str | None]] = {
        "limits": "It knows only the labels it was trained with, may give none of them, and its scores are not "
        "calibrated probabilities. Expect lower accuracy on what differs from its training data."
    }

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("micro_f1", "macro_f1", "subset_accuracy", "map")

    def value(self, cell: object, names: Sequence[str] | None, where: str) -> list[str]:
        """A list of labels, or a text that holds them between separators."""
        separator = self.args.label_separator
        if isinstance(cell, str) and separator is not None:
            cell = [part.strip() for part in cell.split(separator)] if cell.strip() else []
        if not isinstance(cell, list):
            raise UserError(
                f"{where} holds {cell!r}; {self.name} needs a list of labels ([] for none), or label_separator: what "
                "stands between the labels of a text"
            )
        found = [label_name(part, names, where) for part in cell]
        if len(set(found)) < len(found):
            raise UserError(
                f"{where} holds {cell!r}, with the same label twice; list the labels that the row has, each once"
            )
        return found

    def survey(self, values: Sequence[list[str]]) -> str:
        found, empty = Counter(self.names_in(values)), list(values).count([])
        counts = [found[name] for name in self.labels]
        if self.args.class_weights == ["balanced"]:  # a label's rows weigh as much as those without it
            self.weights = torch.tensor([(len(values) - count) / max(count, 1) for count in counts])
        else:
            self.weights = class_weights(self.args.class_weights, self.labels, counts)
        none = f"; {empty:,} rows have none" if empty else ""
        mean = found.total() / len(values)
        return f"training labels: {shares(found, len(values))} of the rows, {mean:.2f} a row{none}"

    def targets(self, values: Sequence[list[str]], ids: Mapping[str, int]) -> list[list[float]]:
        """1 for a label that the row has, 0 for others (K)."""
        ids_of_rows = [{ids[name] for name in value} for value in values]
        return [[float(label in row) for label in range(len(self.labels))] for row in ids_of_rows]

    def num_items(self, labels: torch.Tensor) -> int:
        return labels.numel()

    def criterion(self, logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over rows and labels; `labels` (B, K) in [0, 1].  Focal loss over sigmoids, as in the paper."""
        smooth = labels * (1 - label_smoothing) + label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(
            logits, smooth, pos_weight=on_device_of(logits, self.weights), reduction="none"
        )
        if self.loss == "focal":
            missing = torch.where(labels > 0, 1 - logits.sigmoid(), logits.sigmoid())
            losses = missing**self.args.focal_gamma * losses
        return losses.sum()

    def reported_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1)

    def predictions(self, logits: torch.Tensor) -> list[Prediction]:
        return [{"scores": scores} for scores in logits.sigmoid().tolist()]

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        truth, found = self.true_and_predicted(predictions)
        return several_labels_scores(truth, found, np.array([p["scores"] for p in predictions]))

    def true_and_predicted(self, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
        truth, scores = (np.array([p[key] for p in predictions]) for key in ("truth", "scores"))
        return truth > 0, scores >= self.args.threshold

    def describe(self, prediction: Prediction) -> dict[str, object]:
        scores = zip(self.labels, prediction["scores"], strict=True)
        return {
            "prediction": self._predicted(prediction),
            "scores": {name: round(score, 6) for name, score in scores},
        }

    def predicted_and_true(self, prediction: Prediction) -> tuple[str, str]:
        true = [name for name, has in zip(self.labels, prediction["truth"], strict=True) if has]
        return ", ".join(self._predicted(prediction)) or NOTHING, ", ".join(true) or NOTHING

    def _predicted(self, prediction: Prediction) -> list[str]:
        scores = zip(self.labels, prediction["scores"], strict=True)
        return [name for name, score in scores if score >= self.args.threshold]

    def figures(self, predictions: Sequence[Prediction]) -> list[dict[str, str]]:
        return [hits_and_misses(*self.true_and_predicted(predictions), self.labels)]


class Numbers(LabelType):
    """One number."""

    name = "regression"
    main_metric = "mse"
    losses = tuple(ERRORS)
    min_labels = 0
    about: ClassVar[dict[str, str | None]] = {
        "noun": "regression model",
        "loss_unit": "",
        "limits": "Its numbers come without an error bar, and may lie outside of what is possible. Expect larger "
        "errors on what differs from its training data.",
    }

    def __init__(self, args: Any):
        super().__init__(args)
        ignored = [name for name in ("label_names", "class_weights") if getattr(args, name)]
        if ignored:
            raise UserError(f"{' and '.join(ignored)} have no meaning for {self.name}; leave them out")

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("mse", "mae", "r2", "pearson", "spearman")

    def value(self, cell: object, names: Sequence[str] | None, where: str) -> float:
        try:
            number = float(cell)  # type: ignore[arg-type]  # what cannot be one raises TypeError
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{where} holds {cell!r}; {self.name} needs a finite number: mend the row or take it out")
        return number

    def names_in(self, values: Iterable[Any]) -> Iterator[str]:
        return iter(())

    def agreed_labels(
        self, found: Collection[str], known: Sequence[str], names: Sequence[str], *, is_trained: bool
    ) -> tuple[list[str], dict[str, int]]:
        """A model's only output, named after the column."""
        return list(known) if len(known) == 1 else [self.args.label_column], {}

    def survey(self, values: Sequence[float]) -> str:
        """Raises: UserError if there is nothing to learn."""
        low, high, mean, spread = min(values), max(values), np.mean(values), np.std(values)
        if low == high:
            raise UserError(f"label_column={self.args.label_column!r} holds {low:g} in all training rows")
        note = f"training targets: {low:.4g} to {high:.4g}, mean {mean:.4g}, standard deviation {spread:.4g}"
        if max(abs(mean), spread) <= FAR:
            return note
        return f"{note}; a new head starts at 0 and may not come this far: subtract the mean, divide by the deviation"

    def targets(self, values: Sequence[float], ids: Mapping[str, int]) -> list[float]:
        return list(values)

    def criterion(self, logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
        if label_smoothing:
            raise UserError("label_smoothing_factor has no meaning for regression; leave it out")
        loss: torch.Tensor = ERRORS[self.loss](logits.squeeze(-1), labels, reduction="sum")
        return loss

    def reported_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.squeeze(-1) - labels) ** 2

    def predictions(self, logits: torch.Tensor) -> list[Prediction]:
        return [{"number": number} for number in logits.squeeze(-1).tolist()]

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        return regression_scores(*self.true_and_predicted(predictions))

    def baselines(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Errors of the mean of these rows."""
        truth, _ = self.true_and_predicted(predictions)
        errors = regression_scores(truth, np.full(len(truth), truth.mean()))
        return {f"mean_value_{name}": errors[name] for name in ("mse", "mae")}

    def true_and_predicted(self, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([p["truth"] for p in predictions]), np.array([p["number"] for p in predictions])

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": float(f"{prediction['number']:.6g}")}

    def predicted_and_true(self, prediction: Prediction) -> tuple[str, str]:
        return f"{prediction['number']:.4g}", f"{prediction['truth']:.4g}"

    def figures(self, predictions: Sequence[Prediction]) -> list[dict[str, str]]:
        return [truth_and_prediction(*self.true_and_predicted(predictions), self.labels[0])]


LABEL_TYPES: dict[str, type[LabelType]] = {kind.name: kind for kind in (OneLabel, SeveralLabels, Numbers)}


def shares(found: Counter[str], whole: int) -> str:
    """The most frequent labels and their share of `whole`."""
    names = sorted(sorted(found), key=lambda name: found[name], reverse=True)
    more = f", ... ({len(names)} labels)" if len(names) > SHOWN else ""
    return ", ".join(f"{name} {found[name] / whole:.1%}" for name in names[:SHOWN]) + more


def on_device_of(logits: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor | None:
    return None if weights is None else weights.to(logits.device)


def scores_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """Lines of "label", "rows", "precision", "recall" and "f1"."""
    width = max(len("label"), *(len(row["label"]) for row in scores))
    lines = [f"  {'label':<{width}}  {'rows':>7}  precision  recall     F1"]
    lines += [
        f"  {row['label']:<{width}}  {row['rows']:>7,}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:.4f}"
        for row in scores
    ]
    return "\n".join(lines)


def class_weights(given: Sequence[str] | None, labels: Sequence[str], counts: Sequence[int]) -> torch.Tensor | None:
    """The factor of each label's rows (K,); None: 1 for all.  Raises: UserError if `given` is not one for each."""
    if given is None:
        return None
    if list(given) == ["balanced"]:
        return torch.tensor([sum(counts) / len(labels) / max(count, 1) for count in counts])
    try:
        weights = [float(weight) for weight in given]
    except ValueError:
        weights = []
    if len(weights) != len(labels) or min(weights) < 0:
        raise UserError(
            f"class_weights={' '.join(given)} must be 'balanced', or a number of at least 0 for each of the "
            f"{len(labels)} labels {some(labels)}"
        )
    return torch.tensor(weights)
