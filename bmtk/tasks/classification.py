"""One label for a whole row, whatever the row is: labels, losses, metrics.  B rows, K labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional as F

from bmtk.data.labels import agreed_labels, in_order, label_name, some
from bmtk.data.tables import check_column

from .pictures import confusion_matrix
from .task import DataArguments, Prediction, Task, mean_loss, setting, spread_and_worst

LOSSES = ("cross_entropy", "focal")
TOP = 5  # labels that count as a hit of top5_accuracy


@dataclass
class ClassificationArguments(DataArguments):
    """Which labels, and how a wrong one counts in training."""

    label_column: str = setting("label", "column of the label: a string or an integer")
    label_names: list[str] | None = setting(None, "names of the integer labels 0, 1, ... in that order")
    loss: str = setting("cross_entropy", "training loss: cross_entropy, or focal (rows that are right count less)")
    focal_gamma: float = setting(2.0, "how much less, of loss focal: (1 - probability of the label) to this power")
    class_weights: list[str] | None = setting(
        None,
        "factor of each label in the training loss, in order; balanced: by how rare a label is",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown; choose one of {', '.join(LOSSES)}")
        if self.focal_gamma < 0:
            raise ValueError(f"focal_gamma={self.focal_gamma} must be at least 0")


class Classification(Task):
    """Labels are read by name; the loss that is reported is cross-entropy in nats, whatever is trained with."""

    main_metric = "accuracy"

    # ------------------------------------------------------------------------------------------------ labels

    def read_labels(self, table: Dataset, where: str) -> list[str] | None:
        """The label of each row, by name; None if all of them are secret."""
        name = self.args.label_column
        check_column(table, name, option="label_column", where=where)
        values, kind = list(table[name]), table.features[name]
        if isinstance(kind, ClassLabel):
            if set(values) == {-1}:  # how the Hub marks a test set whose labels are secret
                self.notes.append(f"the {where} rows have no labels and are not used")
                return None
            values = [kind.names[value] if value is not None and value >= 0 else None for value in values]
        place = f"label_column={name!r} of {where} row"
        return [label_name(value, self.args.label_names, f"{place} {row}") for row, value in enumerate(values, 1)]

    @staticmethod
    def labels_in(rows: Dataset) -> Sequence[str]:
        """Every label of the rows, by name, as often as it occurs."""
        return rows["label"]

    def prepare(self) -> None:
        """Find the labels: those of the training rows; of all rows, if none are for training."""
        self.names = self.args.label_names or self._names_in_rows()

    def _names_in_rows(self) -> list[str]:
        sources = [self.rows["train"]] if "train" in self.rows else self.rows.values()
        names = in_order({name for rows in sources for name in self.labels_in(rows)})
        if len(names) < 2 and "train" in self.rows:
            raise ValueError(f"label_column={self.args.label_column!r} holds {names[0]!r} in all training rows")
        return names

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Write the labels into `config`.

        A classifier that knows the labels of the data, by name or by number, keeps its own order of them.
        Raises: ValueError if a validation or test label is unknown.
        """
        known = list(labels) or labels_of(config, self.about["auto_class"])
        found = {name for rows in self.rows.values() for name in self.labels_in(rows)}
        self.labels, self.ids = agreed_labels(found, known, self.names, is_trained="train" in self.rows)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        config.problem_type = "single_label_classification"
        counts = self._balance()
        self.weights = class_weights(self.args.class_weights, self.labels, counts)
        super().configure(config)

    def _balance(self) -> list[int]:
        """How many training rows each label has."""
        if "train" not in self.rows:
            return []
        names, counts = np.unique(self.labels_in(self.rows["train"]), return_counts=True)
        found = dict(zip(names.tolist(), counts.tolist(), strict=True))
        shares = [f"{name} {found[name] / sum(counts):.1%}" for name in sorted(found, key=found.get, reverse=True)]
        more = f", ... ({len(shares)} labels)" if len(shares) > 10 else ""
        self.notes.append(f"training labels: {', '.join(shares[:10])}{more}")
        return [found.get(name, 0) for name in self.labels]

    def label_ids(self, labels: Sequence[str] | Sequence[list[str]], where: str) -> list:
        """The id, or ids, of each row's label.  Raises: ValueError for a label that the model does not know."""
        unknown = {name for label in labels for name in _names(label)} - set(self.ids)
        if unknown:
            first = next(row for row, label in enumerate(labels, 1) if not unknown.isdisjoint(_names(label)))
            raise ValueError(
                f"the {where} data has labels that the training data does not have: {some(unknown)} (first in row "
                f"{first}); known are {some(self.ids)}"
            )
        return [self.ids[label] if isinstance(label, str) else [self.ids[name] for name in label] for label in labels]

    # ------------------------------------------------------------------------------------------------ results

    def criterion(self, outputs, batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0) -> torch.Tensor:
        """The losses of a batch, summed over its rows.

        Computed here because most classifiers of transformers accept `num_items_in_batch` and drop it: their loss and
        gradients grow with gradient accumulation.  Focal loss: Lin et al. 2017, arXiv:1708.02002, over a softmax.
        `labels` are ids (B,), or of rows with several labels the share of each (B, K), for cross-entropy alone.
        """
        logits, labels = outputs["logits"].float(), batch["labels"]
        weights = None if self.weights is None else self.weights.to(logits.device)
        losses = F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=label_smoothing)
        if self.args.loss == "focal":
            of_label = logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
            losses = (1 - of_label) ** self.args.focal_gamma * losses
        return losses.sum()

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        logits = model(**self.inputs_of(batch))["logits"].float()
        best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.tolist()
        scores = logits.softmax(-1).amax(-1).tolist()
        predictions = [
            {"label": labels[0], "top": labels, "score": score} for labels, score in zip(best, scores, strict=True)
        ]
        if "labels" in batch:
            losses = F.cross_entropy(logits, batch["labels"], reduction="none").tolist()
            truths = batch["labels"].tolist()
            for prediction, loss, truth in zip(predictions, losses, truths, strict=True):
                prediction |= {"loss": loss, "items": 1, "truth": truth}
        return predictions

    def score(self, predictions: Sequence[Prediction], rows=None) -> dict[str, float]:
        truth, predicted = truth_and_labels(predictions)
        metrics = {
            "loss": mean_loss(predictions),
            "accuracy": float((predicted == truth).mean()),
            "macro_f1": float(np.mean([row["f1"] for row in scores_by_label(truth, predicted)])),
        }
        if len(predictions[0]["top"]) == TOP and len(self.labels) > TOP:
            metrics["top5_accuracy"] = float(np.mean([p["truth"] in p["top"] for p in predictions]))
        return metrics

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": self.labels[prediction["label"]], "score": round(prediction["score"], 6)}

    def samples(self, predictions: Sequence[Prediction], rows, count: int = 4) -> list[dict[str, str]]:
        return [
            {"prompt": self.shown(rows, row), "text": self.verdict(predictions[row])}
            for row in spread_and_worst(predictions, count)
        ]

    def shown(self, rows, row: int) -> str:
        """A row in words."""
        return f"row {row + 1}"

    def verdict(self, prediction: Prediction) -> str:
        said, truth = self.labels[prediction["label"]], self.labels[prediction["truth"]]
        return f" -> {said}" if said == truth else f" -> {said} (labelled {truth})"

    def figures(self, predictions: Sequence[Prediction], rows) -> list[dict[str, str]]:
        return [confusion_matrix(*truth_and_labels(predictions), self.labels)]

    def table(self, predictions: Sequence[Prediction], rows=None) -> str:
        """Rows, precision, recall and F1 of each label."""
        scores = scores_by_label(*truth_and_labels(predictions))
        return scores_table([{**row, "label": self.labels[row["label"]]} for row in scores])

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "labels": self.labels}


def _names(label: str | list[str]) -> list[str]:
    return [label] if isinstance(label, str) else label


def truth_and_labels(predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p["truth"] for p in predictions]), np.array([p["label"] for p in predictions])


def scores_by_label(truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, float]]:
    """Rows, precision, recall and F1 of each label id that occurs in either array; 0 where a ratio has no cases."""
    scores = []
    for label in np.union1d(truth, predicted):
        is_true, is_predicted = truth == label, predicted == label
        hits, rows, calls = (is_true & is_predicted).sum(), is_true.sum(), is_predicted.sum()
        ratios = {"precision": hits / max(calls, 1), "recall": hits / max(rows, 1), "f1": 2 * hits / (rows + calls)}
        scores.append(
            {"label": int(label), "rows": int(rows), **{name: float(ratio) for name, ratio in ratios.items()}}
        )
    return scores


def scores_table(scores: Sequence[Mapping]) -> str:
    """Lines of "label", "rows", "precision", "recall" and "f1"."""
    width = max(len("label"), *(len(row["label"]) for row in scores))
    lines = [f"  {'label':<{width}}  {'rows':>7}  precision  recall     F1"]
    lines += [
        f"  {row['label']:<{width}}  {row['rows']:>7,}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:.4f}"
        for row in scores
    ]
    return "\n".join(lines)


def class_weights(given: Sequence[str] | None, labels: Sequence[str], counts: Sequence[int]) -> torch.Tensor | None:
    """The factor of each label's rows (K,); None: 1 for all.  Raises: ValueError if `given` is not one for each."""
    if given is None:
        return None
    if list(given) == ["balanced"]:
        return torch.tensor([sum(counts) / len(labels) / max(count, 1) for count in counts])
    try:
        weights = [float(weight) for weight in given]
    except ValueError:
        weights = []
    if len(weights) != len(labels) or min(weights) < 0:
        raise ValueError(
            f"class_weights={' '.join(given)} must be 'balanced', or a number of at least 0 for each of the "
            f"{len(labels)} labels {some(labels)}"
        )
    return torch.tensor(weights)


def labels_of(config, auto_class: str) -> list[str]:
    """The labels that a trained classifier knows, in its order; none for other models, or if it has only numbers."""
    head = auto_class.removeprefix("AutoModel")  # how the class of a model that has this head ends
    if not any(name.endswith(head) for name in config.architectures or ()):
        return []
    names = [config.id2label[index] for index in range(config.num_labels)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names
