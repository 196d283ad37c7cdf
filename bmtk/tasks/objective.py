"""Data bound to a configuration: encoded rows, batches, and the loss of a batch."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel

from bmtk.data.batches import CollatedRows, GlobalBatches, Rows, sequential_batches
from bmtk.data.mixture import Reading
from bmtk.errors import UserError

from .scorer import Scorer
from .task import Criterion
from .task_data import TaskData


class Objective:
    """What a run trains towards.  A subclass has `encode` and `collator`, and mostly `criterion`.

    `TaskData.bind` makes it and then encodes the rows; the constructor only reads and writes `config`.
    """

    needs_whole_batch: ClassVar[bool] = False  # the loss of a row depends on all others of its optimizer step
    # Whether every value of a collated batch has one entry for each row, so that it can be cut into smaller ones.
    batch_can_be_cut = True
    pipeline_options: ClassVar[str] = ""  # Python source of more arguments of `pipeline` in the next command

    def __init__(self, data: TaskData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        """Write into `config` what the data decide (labels, padding).

        `labels` are those of a model whose configuration does not name them: an adapter's.
        Raises: UserError if the model cannot read the rows.
        """
        self.data, self.config = data, config
        self.args, self.notes = data.args, data.notes
        self.name = data.task.name
        self.auto_class: Any = data.task.auto_class
        self.unit = data.task.unit  # what throughput is counted in
        # The part of the training data that `rows` has: below 1 only for the plan of a large corpus.
        self.sampled_share = data.sampled_share
        # Whether `train_batches` go in an order that means something, so that no other sampler may shuffle them.
        self.keeps_order = False
        self.rows: dict[str, Any] = {}  # split -> encoded rows
        self.reading = Reading()  # what training reads of each corpus

    @cached_property
    def scorer(self) -> Scorer:
        return self.data.task.scorer(self)

    @property
    def processor(self) -> Any:
        """Tokenizer, image processor or feature extractor, saved with the model; None if it needs none."""
        return None

    # ------------------------------------------------------------------------------------------------ rows

    def encode_splits(self) -> None:
        """Encode the rows of every split."""
        for split, rows in self.data.rows.items():
            self.rows[split] = self.encode(rows, split)

    def encode(self, rows: Any, where: str) -> Any:
        """Rows as `TaskData.read_rows` gives them, as rows that the collator reads; with `labels` if they have any."""
        raise NotImplementedError

    def encode_inputs(self, table: Dataset) -> Any:
        """Rows without labels, for predictions."""
        return self.encode(self.data.read_rows(table, "input", labelled=False), "input")

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch of rows."""
        raise NotImplementedError

    def training_rows(self) -> Any:
        """The training rows, with what augments them (`set_epoch` begins an epoch); None if there are none."""
        return self.rows.get("train")

    def preview_rows(self) -> Any:
        """The validation rows that are measured while training; all are in the end."""
        return self.rows.get("validation")

    # ------------------------------------------------------------------------------------------------ batches

    def batch_rows(self, rows: Any, *, is_training: bool = False) -> Rows:
        """What `encode` returns, as rows of which a batch can be asked; augmented only if `is_training`."""
        return CollatedRows(rows, self.collator(), is_training=is_training)

    def train_batches(self, **sizes: Any) -> GlobalBatches:
        """The batches of any training step; `sizes` are GlobalBatches' own arguments."""
        batches = GlobalBatches(self.batch_rows(self.training_rows(), is_training=True), **sizes)
        self.check_micro_batches(-(-batches.batch_size // batches.micro_batch_size))
        return batches

    def check_micro_batches(self, count: int) -> None:
        """Raise UserError if an optimizer step is made of `count` micro-batches, and that would change its loss."""
        if self.needs_whole_batch and count > 1:
            raise UserError(
                f"{self.name} compares every row with all others of its optimizer step, which would be cut into "
                f"{count} parts; use one process, without micro_batch_size or gradient_accumulation_steps"
            )

    def batches_in_order(self, rows: Any, **sizes: Any) -> Iterator[dict[str, Any]]:
        """Every one of `rows` once; `sizes` are sequential_batches' own arguments."""
        return sequential_batches(self.batch_rows(rows), **sizes)

    # ------------------------------------------------------------------------------------------------ loss

    @property
    def criterion(self) -> Criterion | None:
        """None: the model's own loss."""
        return None

    def inputs_of(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model reads, where `criterion` computes the loss: all but labels."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def num_items(self, batch: Mapping[str, Any]) -> int | torch.Tensor:
        """How many losses of a batch are summed: its rows, or its predicted positions."""
        return len(batch["labels"])

    def num_units(self, batch: Mapping[str, Any]) -> int | torch.Tensor:
        """How many `unit`s a batch holds, padding not counted."""
        return len(batch["labels"])

    def units_per_row(self, split: str) -> float:
        """Mean number of `unit`s in a row of a split."""
        return 1.0

    def prepare_to_save(self, model: PreTrainedModel) -> None:
        """Set what is saved with the weights and not learned: how `generate()` writes, how tokens are spelled."""

    # ------------------------------------------------------------------------------------------------ in words

    @property
    def about(self) -> dict[str, str | None]:
        return self.data.about

    @property
    def decided_settings(self) -> dict[str, object]:
        """Settings that the data decided."""
        return {"problem_type": self.data.label_type.name} if self.data.label_type else {}

    def data_record(self) -> dict[str, object]:
        """What the report and the model card say of the data."""
        return {**self.data.source_record(), **self.sizes()}

    def sizes(self) -> dict[str, dict[str, float]]:
        """Split -> what it holds, counted."""
        return {split: {"rows": len(rows)} for split, rows in self.rows.items()}

    def next_command(self, directory: Path) -> str:
        """What to type to see the result; pipeline() would give an adapter the labels of its base."""
        if (directory / "adapter_config.json").is_file():
            return f"accelerate launch recipes/evaluate.py --model {shlex.quote(str(directory))}"
        given = f"{self.about['pipeline_tag']!r}, model={str(directory)!r}{self.pipeline_options}"
        return python_command(
            f"import bmtk; from transformers import pipeline; print(pipeline({given})({self.example_input()}))"
        )

    def example_input(self) -> str:
        """Python source of what `pipeline` may be called with."""
        return "'A text of your own.'"


def python_command(source: str) -> str:
    """The command that runs one line of Python, quoted for a shell, in double quotes if nothing in it forbids that."""
    return f'python -c "{source}"' if not set(source) & set('"$`\\!') else f"python -c {shlex.quote(source)}"
