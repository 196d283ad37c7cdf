"""Every metric of this folder as a module of Hugging Face's evaluate, from one file:

    bmtk.metrics.load("entity_f1"), or without importing bmtk first: evaluate.load("path/to/metric.py", "entity_f1")

Batches are streamed to a file, and the network is not used.  Tasks compute their scores with the same functions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import List, Value

from bmtk.errors import UserError

# By full names, also inside of this folder: evaluate copies this file alone, and loads it as a module of its own.
from bmtk.metrics.answers import agreement as answer_agreement
from bmtk.metrics.boxes import average_precisions, summary
from bmtk.metrics.entities import agreement as entity_agreement
from bmtk.metrics.entities import entities, is_scheme, single_words
from bmtk.metrics.forecasts import quantile_scores, scores
from bmtk.metrics.labels import one_label_scores, several_labels_scores, top_accuracy
from bmtk.metrics.numbers import regression_scores
from bmtk.metrics.retrieval import retrieval_scores
from bmtk.metrics.texts import bits_per_byte, error_rates, perplexity, translation_scores

INTEGER, NUMBER, TEXT = Value("int64"), Value("float64"), Value("string")
BOXES = {"boxes": List(List(NUMBER)), "labels": List(INTEGER)}  # of an image
Values = Sequence[Any]  # a row each, as the Kind of the metric says
AS_THEY_ARE = {"mean": [0.0], "std": [1.0]}  # values that are not standardised


@dataclass(frozen=True)
class Kind:
    """The types of a prediction and a reference, and the function that scores all of them."""

    predictions: object
    references: object
    compute: Callable[..., dict[str, object]]


def _accuracy(predictions: Values, references: Values) -> dict[str, Any]:
    return one_label_scores(np.array(references), np.array(predictions))


def _top_accuracy(predictions: Values, references: Values) -> dict[str, Any]:
    return {f"top{len(predictions[0])}_accuracy": top_accuracy(references, predictions)}


def _multi_label(predictions: Values, references: Values, threshold: float = 0.5) -> dict[str, Any]:
    found = np.array(predictions)
    return several_labels_scores(np.array(references) > 0, found >= threshold, found)


def _regression(predictions: Values, references: Values) -> dict[str, Any]:
    return regression_scores(np.array(references), np.array(predictions))


def _entity_f1(predictions: Values, references: Values) -> dict[str, Any]:
    tags = {tag for rows in (references, predictions) for row in rows for tag in row}
    read = entities if is_scheme(tags) else single_words
    found = entity_agreement(*([read(row) for row in rows] for rows in (references, predictions)))
    of_all = found.pop("")
    return {**{name: of_all[name] for name in ("precision", "recall", "f1")}, "by_type": found}


def _answers(predictions: Values, references: Values, by: str = "words") -> dict[str, Any]:
    pairs = [answer_agreement(one, several, by=by) for one, several in zip(predictions, references, strict=True)]
    exact, f1 = np.mean(pairs, axis=0).tolist()
    return {"exact_match": exact, "f1": f1}


def _translation(
    predictions: Values, references: Values, tokenizer: str = "13a", lower_case: bool = False
) -> dict[str, Any]:
    found, signatures = translation_scores(predictions, references, tokenizer=tokenizer, lower_case=lower_case)
    return {**found, "signatures": signatures}


def _error_rates(predictions: Values, references: Values) -> dict[str, Any]:
    return error_rates(references, predictions)


def _detection(predictions: Values, references: Values) -> dict[str, Any]:
    num_labels = 1 + max((label for image in (*predictions, *references) for label in image["labels"]), default=0)
    return summary(average_precisions(references, predictions, num_labels))


def _forecast(predictions: Values, references: Values, seasonal_error: float = 0.0) -> dict[str, Any]:
    forecast, truth = (np.array(values)[..., None] for values in (predictions, references))
    found = scores(forecast, truth, {**AS_THEY_ARE, "seasonal_error": [seasonal_error]})
    return {name: value for name, value in found.items() if not name.startswith("original_")}


def _quantiles(predictions: Values, references: Values, levels: Sequence[float]) -> dict[str, Any]:
    quantiles, truth = np.array(predictions)[:, :, None], np.array(references)[..., None]
    return quantile_scores(quantiles, levels, truth, AS_THEY_ARE)


def _retrieval(predictions: Values, references: Values, top: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """The rank of the right item among the R found ones: R + 1 if it is not among them."""
    pairs = zip(predictions, references, strict=True)
    return retrieval_scores([(*found, right).index(right) + 1 for found, right in pairs], top)


def _likelihood(predictions: Values, references: Values, num_bytes: int | None = None) -> dict[str, Any]:
    loss = sum(predictions) / sum(references)
    bits = {} if num_bytes is None else {"bits_per_byte": bits_per_byte(sum(predictions), num_bytes)}
    return {"loss": loss, "perplexity": perplexity(loss), **bits}


KINDS = {
    "accuracy": Kind(INTEGER, INTEGER, _accuracy),
    "top_accuracy": Kind(List(INTEGER), INTEGER, _top_accuracy),  # the best labels of each row
    "multi_label": Kind(List(NUMBER), List(INTEGER), _multi_label),  # a score, and 0 or 1, for each label
    "regression": Kind(NUMBER, NUMBER, _regression),
    "entity_f1": Kind(List(TEXT), List(TEXT), _entity_f1),  # tags: IOB1, IOB2, BIOES or plain
    "answers": Kind(TEXT, List(TEXT), _answers),  # by="characters" for Chinese
    "translation": Kind(TEXT, TEXT, _translation),
    "error_rates": Kind(TEXT, TEXT, _error_rates),
    "detection": Kind({**BOXES, "scores": List(NUMBER)}, BOXES, _detection),
    "forecast": Kind(List(NUMBER), List(NUMBER), _forecast),  # of standardised values; NaN: not observed
    "quantiles": Kind(List(List(NUMBER)), List(NUMBER), _quantiles),  # (H, Q) for the Q `levels`
    "retrieval": Kind(List(INTEGER), INTEGER, _retrieval),  # what was found, the best first; what is right
    "likelihood": Kind(NUMBER, INTEGER, _likelihood),  # summed nats of a row, and its tokens
}


class BmtkMetric(evaluate.Metric):
    """One of KINDS, chosen by `config_name`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in KINDS:
            raise UserError(f"metric {self.config_name!r} is unknown; choose one of {', '.join(KINDS)}")
        kind = KINDS[self.config_name]
        features = datasets.Features({"predictions": kind.predictions, "references": kind.references})
        text = {"description": f"{self.config_name} of bmtk", "citation": "", "inputs_description": str(features)}
        return evaluate.MetricInfo(features=features, **text)

    def _compute(self, **columns_and_options: object) -> dict[str, object]:
        return KINDS[self.config_name].compute(**columns_and_options)
