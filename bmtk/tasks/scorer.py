"""Outputs become predictions, and the predictions of a whole split become metrics, samples and figures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from datasets import Dataset

from .inference import beside_inputs
from .task import Prediction

if TYPE_CHECKING:
    from .objective import Objective


class Scorer:
    """How well a model does.  A subclass has `metrics`, and the methods that raise NotImplementedError."""

    metrics: Sequence[str]  # what `score` measures of a model: the names that a best model may be chosen by
    draws_images: ClassVar[bool] = False  # whether `annotated_image` can be called

    def __init__(self, objective: "Objective"):
        self.objective = objective

    @property
    def main_metric(self) -> str:
        """The one that a best model is chosen by where the settings name none."""
        return self.objective.data.main_metric

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """One prediction for each row of a batch; with `loss` (a sum) and `items` if the batch has labels."""
        raise NotImplementedError

    def preview(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """What `predict` gives, in evaluations while training; a task may give it cheaper there."""
        return self.predict(model, batch)

    def score(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """Metrics over all `rows` at once."""
        raise NotImplementedError

    def baselines(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """The metrics of a guess that needs no model, such as `majority_accuracy` (prefixes: bmtk.hub.formatting)."""
        return {}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """A prediction in words and plain numbers, for a line of CSV or JSON."""
        raise NotImplementedError

    def lines(self, prediction: Prediction, index: int, rows: Any, table: Dataset) -> list[dict[str, object]]:
        """What predict.py writes for one of `rows`, which `encode_inputs` made of `table`."""
        return [beside_inputs(table[index], self.describe(prediction))]

    def annotated_image(self, prediction: Prediction, index: int, rows: Any) -> Any:
        """The image of one of the rows with what was predicted drawn over it."""
        raise NotImplementedError

    def generated_samples(self, model: torch.nn.Module, *, seed: int) -> list[dict[str, str]]:
        """What a generative model writes after the prompts of the settings: {"prompt", "text"}."""
        return []

    def samples(self, predictions: Sequence[Prediction], rows: Any, count: int = 4) -> list[dict[str, str]]:
        """Some rows and what was predicted for them ({"prompt", "text"}): from all over, then the worst."""
        return []

    def figures(self, predictions: Sequence[Prediction], rows: Any) -> list[dict[str, str]]:
        """Figures for the report: {"title", "svg"}, or {"title", "png_base64"}."""
        return []

    def table(self, predictions: Sequence[Prediction], rows: Any) -> str:
        """Details of `score` for the terminal; empty: none."""
        return ""


def mean_loss(predictions: Sequence[Prediction]) -> float:
    """Loss per item over all predictions, whatever the batches were."""
    return float(sum(p["loss"] for p in predictions) / max(1, sum(p["items"] for p in predictions)))


def spread_and_worst(predictions: Sequence[Prediction], count: int) -> list[int]:
    """`count` rows from all over a split, then the `count` with the largest loss that are not among them."""
    spread = np.linspace(0, len(predictions) - 1, min(count, len(predictions))).astype(int).tolist()
    if not predictions or "loss" not in predictions[0]:
        return spread
    by_loss = np.argsort([-p["loss"] for p in predictions], kind="stable").tolist()
    return spread + [row for row in by_loss if row not in spread][:count]
