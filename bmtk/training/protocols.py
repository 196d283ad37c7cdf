"""What training and evaluation read of a task.  They stay below `tasks`, and import nothing of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

Batch = dict[str, Any]  # tensors, and what the scorer needs beside them
Prediction = dict[str, Any]  # of one row: small enough to keep for a whole split; `loss` is a sum over `items`
Sample = dict[str, str]  # "prompt" and "text"
Figure = dict[str, str]  # "title", and "svg" or "png_base64"


class TrainBatches(Protocol):
    """batches[step] is the list of this process's micro-batches of optimizer step `step`."""

    batch_size: int  # rows of an optimizer step over all processes
    micro_batch_size: int
    carries_state: bool  # whether rows go on from the recurrent state of the step before

    @property
    def steps_per_epoch(self) -> float: ...

    def __getitem__(self, step: int) -> list[Batch]: ...


@runtime_checkable
class KnowsRows(Protocol):
    """Batches that can say which rows a step has."""

    def places(self, step: int) -> tuple[Any, Any]:
        """Rows of optimizer step `step` that are this process's, and the epoch of each."""


class TrainingScorer(Protocol):
    """Outputs become predictions, and predictions of a whole split become metrics."""

    @property
    def metrics(self) -> Sequence[str]:
        """What `score` measures of a model: the names that a best model may be chosen by."""

    @property
    def main_metric(self) -> str:
        """One of them."""

    def predict(self, model: torch.nn.Module, batch: Batch) -> list[Prediction]:
        """One prediction for each row of a batch; with `loss` (a sum) and `items` if the batch has labels."""

    def preview(self, model: torch.nn.Module, batch: Batch) -> list[Prediction]:
        """What `predict` gives, in evaluations while training; a task may give it cheaper there."""

    def score(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """Metrics over all `rows` at once."""

    def baselines(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """The metrics of a guess that needs no model, such as `majority_accuracy`."""

    def generated_samples(self, model: torch.nn.Module, *, seed: int) -> list[Sample]:
        """What a generative model writes after the prompts of the settings."""

    def samples(self, predictions: Sequence[Prediction], rows: Any) -> list[Sample]:
        """Some rows and what was predicted for them."""

    def figures(self, predictions: Sequence[Prediction], rows: Any) -> list[Figure]:
        """Figures for the report."""


class TrainingObjective(Protocol):
    """Encoded rows, batches and the loss of one run."""

    rows: dict[str, Any]  # split -> encoded rows
    notes: list[str]

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """What throughput is counted in."""

    @property
    def scorer(self) -> TrainingScorer: ...

    @property
    def auto_class(self) -> Any:
        """The Auto class of the models that can be trained."""

    @property
    def criterion(self) -> Callable[..., torch.Tensor] | None:
        """(outputs, batch, *, label_smoothing) -> the losses of a batch, summed; None: the model's own loss."""

    @property
    def processor(self) -> Any:
        """Tokenizer, image processor or feature extractor, saved with the model; None if it needs none."""

    @property
    def sampled_share(self) -> float:
        """The part of the training data that `rows` has: below 1 only for the plan of a large corpus."""

    @property
    def batch_can_be_cut(self) -> bool:
        """Whether every value of a collated batch has one entry for each row."""

    @property
    def keeps_order(self) -> bool:
        """Whether `train_batches` go in an order that means something, so that no other sampler may shuffle them."""

    def training_rows(self) -> Any:
        """The training rows, with what augments them; None if there are none."""

    def preview_rows(self) -> Any:
        """The validation rows that are measured while training; all are in the end."""

    def collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        """Makes a batch of rows."""

    def train_batches(self, **sizes: int) -> TrainBatches:
        """The batches of any training step."""

    def batches_in_order(self, rows: Any, **sizes: int) -> Iterator[Batch]:
        """Every one of `rows` once."""

    def check_micro_batches(self, count: int) -> None:
        """Raise UserError if an optimizer step is made of `count` micro-batches, and that would change its loss."""

    def inputs_of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model reads, where `criterion` computes the loss."""

    def num_items(self, batch: Mapping[str, Any]) -> int | torch.Tensor:
        """How many losses of a batch are summed."""

    def num_units(self, batch: Mapping[str, Any]) -> int | torch.Tensor:
        """How many `unit`s a batch holds, padding not counted."""

    def units_per_row(self, split: str) -> float:
        """Mean number of `unit`s in a row of a split."""

    def prepare_to_save(self, model: PreTrainedModel) -> None:
        """Set what is saved with the weights and not learned: how `generate()` writes, how tokens are spelled."""


class BindableData(Protocol):
    """Rows as they were read, which `bind` encodes for a configuration."""

    notes: list[str]

    def new_config(self, model_type: str, chosen: Mapping[str, object], *, preset: str | None = None) -> Any:
        """The configuration of a new model."""

    def bind(self, config: Any, *, labels: Sequence[str] = ()) -> TrainingObjective:
        """Write into `config` what the data decide, and encode the rows for it."""
