"""Predictions over whole splits: every row once, in order, on any number of processes."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .updates import on_device

ERRORS = frozenset("loss mse mae mase wer cer perplexity rank byte".split())  # last words of metrics that should fall
SHORT = 20  # batches of an evaluation that shows no progress bar


def lower_is_better(metric: str) -> bool:
    """Whether a model is the better, the smaller its `metric` is: "loss", "eval_loss", "validation/original_mae"."""
    return metric.rpartition("/")[2].rpartition("_")[2] in ERRORS


@dataclass
class Results:
    """Metrics of every split that was not trained on, and what there is to see of the last of them."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    inference: dict[str, float] = field(default_factory=dict)  # speed over the test rows, of all processes together


@torch.no_grad()
def predict_all(
    model: torch.nn.Module,
    batches: Iterable,
    accelerator: Accelerator,
    predict: Callable[[torch.nn.Module, dict], list],
    *,
    description: str = "evaluating",
    num_batches: int = 0,
    show_progress: bool = True,
) -> list:
    """What `predict(model, batch)` returns for the `batches` of all processes, in the order of their ranks.

    `batches` are this process's share, and may be more or fewer than another's.  The model is evaluated under the
    accelerator's precision, and is left training if it was.
    """
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    was_training, predictions = model.training, []
    model.eval()
    hidden = not (show_progress and accelerator.is_main_process and num_batches >= SHORT)
    with tqdm(total=num_batches, desc=description, leave=False, disable=hidden) as bar:
        for batch in batches:
            with accelerator.autocast():
                predictions += predict(model, on_device(batch, accelerator.device))
            bar.update()
    model.train(was_training)
    return gather_object(predictions) if accelerator.num_processes > 1 else predictions


class Evaluator:
    """Evaluates a task's splits by a model while it trains, each row on one of the processes."""

    def __init__(self, task, model: torch.nn.Module, accelerator: Accelerator, *, batch_size: int):
        self.task, self.model, self.accelerator, self.batch_size = task, model, accelerator, batch_size
        self.kept: dict[str, list] = {}  # predictions of the last evaluation, which is that of the finished model

    def predict(self, split: str) -> list:
        ranks = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        batches = self.task.batches_in_order(self.task.rows[split], batch_size=self.batch_size, **ranks)
        return predict_all(self.model, batches, self.accelerator, self.task.predict)

    def validate(self) -> dict[str, float]:
        """Metrics of the validation rows, if there are any."""
        if "validation" not in self.task.rows:
            return {}
        self.kept["validation"] = self.predict("validation")
        metrics = self.task.score(self.kept["validation"], self.task.rows["validation"])
        return {f"validation/{name}": value for name, value in metrics.items()}

    def results(self, *, seed: int) -> Results:
        """Everything about the finished model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return measure(self.task, model, lambda split: self.kept.get(split) or self.predict(split), seed=seed)


def measure(task, model, predict_split: Callable[[str], list], *, seed: int) -> Results:
    """Score, samples and figures of a task's splits but the training rows; `predict_split` gives their predictions."""
    model.eval()
    results = Results(samples=task.written(model, seed=seed))
    for split in (split for split in task.rows if split != "train"):
        started = time.perf_counter()
        predictions, rows = predict_split(split), task.rows[split]
        if split == "test":  # predictions of the validation rows may have been there
            results.inference = {"rows_per_second": len(rows) / (time.perf_counter() - started)}
        results.metrics |= {f"{split}/{name}": value for name, value in task.score(predictions, rows).items()}
        samples, figures = task.samples(predictions, rows), task.figures(predictions, rows)
    results.samples += samples
    results.figures = figures
    return results
