"""Predictions over whole splits: every row once, in order, on any number of processes."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .prepared import Prepared
from .progress import Bar
from .protocols import Batch, Figure, Prediction, Sample, TrainingObjective
from .sharding import evaluating, is_fsdp
from .updates import on_device

ERRORS = frozenset("loss mse mae mase wer cer perplexity rank byte".split())  # last words of metrics that should fall
SHORT = 20  # batches of an evaluation that shows no progress bar


def lower_is_better(metric: str) -> bool:
    """Whether a lower value of `metric` is better, such as "loss", "eval_loss" or "validation/original_mae"."""
    return metric.rpartition("/")[2].rpartition("_")[2] in ERRORS


@dataclass
class Results:
    """Metrics of every split that was not trained on; samples and figures of the last of them."""

    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    inference: dict[str, float] = field(default_factory=dict)  # speed over the test rows, of all processes together


@torch.no_grad()
def predict_all(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    accelerator: Accelerator,
    predict: Callable[[torch.nn.Module, Batch], list[Prediction]],
    *,
    description: str = "evaluating",
    num_batches: int = 0,
    show_progress: bool = True,
    is_copy: bool = False,
) -> list[Prediction]:
    """What `predict(model, batch)` returns for the `batches` of all processes, in the order of their ranks.

    `batches` are this process's share, and may be more or fewer than another's; with `is_copy`, another process
    predicts the very same ones.  The model is evaluated under the
    accelerator's precision, and is left training if it was.
    """
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    was_training = model.training
    predictions: list[Prediction] = []
    model.eval()
    hidden = not (show_progress and accelerator.is_main_process and num_batches >= SHORT)
    in_step: Iterator[tuple[Batch, bool]] = in_lockstep(batches) if is_fsdp(model) else ((b, True) for b in batches)
    with evaluating(model), Bar(total=num_batches, desc=description, leave=False, disable=hidden) as bar:
        for batch, is_own in in_step:
            with accelerator.autocast():
                found = predict(model, on_device(batch, accelerator.device))
            predictions += found if is_own else []
            bar.update()
    model.train(was_training)
    if accelerator.num_processes == 1:
        return predictions
    return gather_object([] if is_copy else predictions)


def in_lockstep(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """The batches, and whether each is this process's own; other processes' until all have come to their end.

    Each forward pass of a sharded model needs all processes, also those that have no rows left.
    """
    rank, own = torch.distributed.get_rank(), iter(batches)
    while True:
        batch = next(own, None)
        has_one: list[bool] = [False] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(has_one, batch is not None)
        if not any(has_one):
            return
        if not all(has_one):
            stand_in = [batch]
            torch.distributed.broadcast_object_list(stand_in, src=has_one.index(True))
            yield cast(Batch, batch if has_one[rank] else stand_in[0]), has_one[rank]
        else:
            yield cast(Batch, batch), True


class Evaluator:
    """Evaluates an objective's splits by a model while it trains, each row on one of the processes."""

    def __init__(self, objective: TrainingObjective, prepared: Prepared, *, batch_size: int):
        self.objective, self.prepared, self.batch_size = objective, prepared, batch_size
        self.model, self.accelerator = prepared.model, prepared.accelerator
        self.kept: dict[str, list[Prediction]] = {}  # of the last evaluation, which is that of the finished model

    def predict(self, split: str) -> list[Prediction]:
        """A prediction for each row of a split, from all processes."""
        rows, is_copy = self.objective.rows[split], self.prepared.is_copy
        batches = self.objective.batches_in_order(rows, batch_size=self.batch_size, **self.prepared.share)
        return predict_all(self.model, batches, self.accelerator, self.objective.scorer.predict, is_copy=is_copy)

    def validate(self) -> dict[str, float]:
        """Metrics of the validation rows, if there are any."""
        if "validation" not in self.objective.rows:
            return {}
        self.kept["validation"] = self.predict("validation")
        metrics = self.objective.scorer.score(self.kept["validation"], self.objective.rows["validation"])
        return {f"validation/{name}": value for name, value in metrics.items()}

    def results(self, *, seed: int) -> Results:
        """Metrics, samples and figures of the finished model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

        def predict_split(split: str) -> list[Prediction]:
            return self.kept.get(split) or self.predict(split)

        draws = self.accelerator.is_main_process
        return measure(self.objective, model, predict_split, seed=seed, draws=draws)


def measure(
    objective: TrainingObjective,
    model: torch.nn.Module,
    predict_split: Callable[[str], list[Prediction]],
    *,
    seed: int,
    draws: bool = True,
) -> Results:
    """Metrics, samples and figures of the splits but the training rows; `predict_split` gives their predictions.

    draws: whether this process is the one that needs the figures, which take seconds.
    """
    model.eval()
    scorer, results = objective.scorer, Results()
    with evaluating(model):
        results.samples += scorer.generated_samples(model, seed=seed)
    samples: list[Sample] = []
    splits = [split for split in objective.rows if split != "train"]
    for split in splits:
        started = time.perf_counter()
        predictions, rows = predict_split(split), objective.rows[split]
        if split == "test":  # predictions of the validation rows may have been made before
            results.inference = {"rows_per_second": len(rows) / (time.perf_counter() - started)}
        metrics = scorer.score(predictions, rows) | scorer.baselines(predictions, rows)
        results.metrics |= {f"{split}/{name}": value for name, value in metrics.items()}
        samples = scorer.samples(predictions, rows)
        if draws and split == splits[-1]:
            results.figures = scorer.figures(predictions, rows)
    results.samples += samples
    return results
