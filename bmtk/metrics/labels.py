"""Precision, recall, F1 and accuracy of classification.  N rows, K labels."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def ratios(hits: int, rows: int, calls: int) -> dict[str, float]:
    """Precision, recall and F1 of `calls` predicted and `rows` true cases with `hits` in common; 0 without cases."""
    precision, recall, f1 = hits / max(calls, 1), hits / max(rows, 1), 2 * hits / max(rows + calls, 1)
    return {"rows": int(rows), "precision": float(precision), "recall": float(recall), "f1": float(f1)}


def scores_by_label(truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, float]]:
    """`ratios` of each "label" that occurs in either array; ids (N,), or whether a row has the label (N, K)."""
    if truth.ndim == 1:
        pairs = {label: (truth == label, predicted == label) for label in np.union1d(truth, predicted)}
    else:
        pairs = {label: both for label, both in enumerate(zip(truth.T, predicted.T, strict=True)) if np.any(both)}
    return [
        {"label": int(label), **ratios((one & other).sum(), one.sum(), other.sum())}
        for label, (one, other) in pairs.items()
    ]


def macro_f1(scores: Iterable[Mapping[str, float]]) -> float:
    """Mean F1 of `scores_by_label`; 0 if no label occurs."""
    return float(np.mean([row["f1"] for row in scores] or [0.0]))


def one_label_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 of ids (N,)."""
    accuracy = float((truth == predicted).mean())
    return {"accuracy": accuracy, "macro_f1": macro_f1(scores_by_label(truth, predicted))}


def top_accuracy(truth: Sequence[int], best: Sequence[Sequence[int]]) -> float:
    """Share of the rows whose label (N,) is among their k best predictions (N, k)."""
    return float(np.mean([label in labels for label, labels in zip(truth, best, strict=True)]))


def several_labels_scores(truth: np.ndarray, found: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Multi-label classification: `truth` and `found` (N, K), bool; `scores` (N, K), higher for more certain labels.

    map: the mean average precision over the labels that occur in truth.
    """
    from sklearn.metrics import average_precision_score  # a second to import

    of_all = ratios((truth & found).sum(), truth.sum(), found.sum())
    there = np.flatnonzero(truth.any(0))
    precisions = [average_precision_score(truth[:, label], scores[:, label]) for label in there]
    return {
        "micro_f1": of_all["f1"],
        "macro_f1": macro_f1(scores_by_label(truth, found)),
        "subset_accuracy": float((truth == found).all(1).mean()),
        "map": float(np.mean(precisions)) if precisions else 0.0,
    }
