"""What the recipes ask of a task.  One task is one file with one subclass of `Task`.

    rows on disk -> read_rows -> encode -> collator -> model -> predict -> score, describe, samples, figures

Everything that is measured goes through `predict`: one prediction for each row, small enough to keep (a label, a text,
boxes), never the logits.  So metrics are over whole splits, whatever the batch size and the number of processes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bmtk.data.batches import CollatedRows, GlobalBatches, Rows, sequential_batches
from bmtk.data.fingerprints import fingerprints
from bmtk.data.tables import SPLITS, check_column, read_splits
from bmtk.settings import setting

from .inference import shown

LEAKAGE = ("stop", "drop", "allow")
Prediction = dict[str, Any]


@dataclass
class DataArguments:
    """Where the rows are, and what they are called."""

    dataset: str | None = setting(None, "folder with train, validation and test parts, a file, or Hub id owner/name")
    train_file: list[str] | None = setting(None, "training rows: .csv, .tsv, .jsonl, .json, .parquet; over dataset")
    validation_file: list[str] | None = setting(None, "validation rows, likewise")
    test_file: list[str] | None = setting(None, "test rows, likewise")
    validation_fraction: float = setting(0.1, "share of training rows held out where no validation rows are given")
    group_column: str | None = setting(
        None, "rows with the same value here, such as a speaker, are held out together; of questions: their text"
    )
    leakage: str = setting(
        "stop", "training rows whose input is among the validation or test rows, too: stop, drop (them) or allow"
    )
    data_name: str | None = setting(None, "what the model card calls the data; default: the source's own name")
    data_licence: str | None = setting(None, "licence of the data, for the model card")

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} is not a share; choose between 0 and 1")
        if self.leakage not in LEAKAGE:
            raise ValueError(f"leakage={self.leakage!r} is unknown; choose one of {', '.join(LEAKAGE)}")


class Task:
    """The rows, labels, loss and metrics of one run.

    `model` is the folder or Hub id whose processor is read if `args` name no other; of `splits`, those are read that
    are there (none: a task without data, for `encode_inputs`).  `notes` collects, in sentences, what was found in the
    data and what was decided without being asked for.

    A subclass fills in the class attributes and the methods that raise NotImplementedError.
    """

    name: ClassVar[str]
    about: ClassVar[
        dict[str, str | None]
    ]  # for model card and report: pipeline_tag, auto_class, processor_class, noun, limits, loss_unit (else nats)
    arguments: ClassVar[type[DataArguments]]
    auto_class: ClassVar[type]
    peft_task_type: ClassVar[str | None] = None
    free_keys: ClassVar[frozenset[str]] = frozenset(("data_name", "data_licence"))  # may differ when a run is resumed
    unit: ClassVar[str] = "rows"  # what throughput is counted in
    inputs: ClassVar[tuple[str, ...]]  # columns of `read_rows` that make two rows the same
    metrics: ClassVar[Sequence[str]]  # what a model is chosen by, of all that `score` tells; known after `configure`
    main_metric: ClassVar[str]  # one of them: what `load_best_model_at_end` goes by unless told otherwise
    cuts_one_table: ClassVar[bool] = False  # whether a single table holds the rows of all splits
    # Sum of a batch's losses from (outputs, batch, label_smoothing=...); None: the model's own loss.
    criterion: ClassVar[Callable | None] = None
    # The image of one of the rows, (prediction, index, rows), with what was predicted drawn over it; None: no images.
    drawn: ClassVar[Callable | None] = None
    whole_steps: ClassVar[bool] = False  # the loss of a row depends on all others of its optimizer step

    def __init__(
        self,
        args: DataArguments,
        *,
        model: str | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 42,
        folder: Path | None = None,
        **loading: object,
    ):
        """`folder` is where a task may keep what it prepares; `loading` is for `from_pretrained`."""
        self.args, self.model, self.seed, self.loading = args, model, seed, loading
        self.notes: list[str] = []
        tables = {split: self.usable(table, split) for split, table in self._tables(splits).items()}
        read = {split: self.read_rows(table, split, labelled=True) for split, table in tables.items()}
        self.rows: dict[str, Any] = {split: rows for split, rows in read.items() if rows is not None}
        self._keep_apart()
        self.prepare()

    @classmethod
    def metric_of(cls, args: DataArguments, **reading: object) -> str:
        """`main_metric` of the task that `args` and `reading` make: for a task whose rows decide it, they are read."""
        return cls.main_metric

    @classmethod
    def incomparable(cls, args: DataArguments, metric: str) -> dict[str, str]:
        """Settings that change what `metric` measures, each with how: no search may choose between models by them."""
        return {}

    # ------------------------------------------------------------------------------------------------ rows

    @property
    def group_option(self) -> str:
        """The setting that names the column whose values are held out with all of their rows."""
        return "group_column"

    def usable(self, table: Dataset, where: str) -> Dataset:
        """Those rows of `table` that can be read at all; called before `read_rows` and `encode_inputs`."""
        return table

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset | None:
        """The columns of `table` that the task reads, under its own names; None for a split without labels.

        `where` names the rows in errors ("train").  Raises: ValueError for a column or value that cannot be used.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Make what comes of all rows together: the labels' names, a tokenizer."""

    @property
    def config_fields(self) -> dict[str, object]:
        """What the configuration of a new model takes from the data."""
        return {}

    def new_config(self, model_type: str, chosen: Mapping[str, object], *, preset: str | None = None):
        """The configuration of a new model: `chosen` fields over those of a preset over what the data say.

        Which tokens there are is decided by the data, whatever the preset says.
        """
        tokens = {k: v for k, v in self.config_fields.items() if k == "vocab_size" or k.endswith("_token_id")}
        of_preset = CONFIG_MAPPING[model_type].presets[preset] if preset else {}
        return build_config(model_type, {**self.config_fields, **of_preset, **tokens}, chosen)

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Write into `config` what the data say (labels, padding), and turn `rows` into what the collator reads.

        `labels` are those of a model whose configuration does not say them.
        Raises: ValueError if the model cannot read the rows.
        """
        self.rows = {split: self.encode(rows, split) for split, rows in self.rows.items()}

    def encode(self, rows: Dataset, where: str) -> Any:
        """Rows as `read_rows` gives them, as rows that the collator reads; with `labels` if they have any."""
        raise NotImplementedError

    def encode_inputs(self, table: Dataset) -> Any:
        """Rows without labels, for predictions; call `configure` first."""
        return self.encode(self.read_rows(table, "input", labelled=False), "input")

    def collator(self) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
        """Makes a batch of rows."""
        raise NotImplementedError

    def batch_rows(self, rows, *, is_training: bool = False) -> Rows:
        """What `encode` returns, as rows of which a batch can be asked; augmented only if `is_training`."""
        return CollatedRows(rows, self.collator(), is_training=is_training)

    def train_batches(self, **sizes) -> GlobalBatches:
        """The batches of any training step; `sizes` are GlobalBatches' own arguments."""
        batches = GlobalBatches(self.batch_rows(self.training_rows(), is_training=True), **sizes)
        self.check_parts(-(-batches.batch_size // batches.micro_batch_size))
        return batches

    def check_parts(self, count: int) -> None:
        """Raise ValueError if the rows of an optimizer step are seen in parts, and that would change their loss."""
        if self.whole_steps and count > 1:
            raise ValueError(
                f"{self.name} compares every row with all others of its optimizer step, which would be cut into "
                f"{count} parts; use one process, without micro_batch_size or gradient_accumulation_steps"
            )

    def batches_in_order(self, rows, **sizes) -> Iterator[dict[str, torch.Tensor]]:
        """Every one of `rows` once; `sizes` are sequential_batches' own arguments."""
        return sequential_batches(self.batch_rows(rows), **sizes)

    # ------------------------------------------------------------------------------------------------ training

    def prepare_to_save(self, model) -> None:
        """Set what is saved with the weights: how `generate()` writes by default."""

    def training_rows(self) -> Any:
        """The training rows, with what augments them (told of a new epoch by `set_epoch`); None if there are none."""
        return self.rows.get("train")

    @staticmethod
    def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model reads, where `criterion` computes the loss: all but labels."""
        return {name: value for name, value in batch.items() if name != "labels"}

    @property
    def losses(self) -> dict[str, Callable | None]:
        """How a batch's losses are counted, summed, and what the model reads for it."""
        return {"num_items": self.num_items, "criterion": self.criterion, "inputs_of": self.inputs_of}

    @staticmethod
    def num_items(batch: Mapping[str, Any]) -> int | torch.Tensor:
        """How many losses of a batch are summed: its rows, or its predicted positions."""
        return len(batch["labels"])

    def num_units(self, batch: Mapping[str, Any]) -> int:
        """How many `unit`s a batch holds, padding not counted."""
        return len(batch["labels"])

    def units_per_row(self, split: str) -> float:
        """Mean number of `unit`s in a row of a split."""
        return 1.0

    @property
    def has_own_order(self) -> bool:
        """Whether `train_batches` go in an order that means something, so that no other sampler may shuffle them."""
        return False

    def preview_rows(self) -> Any:
        """The validation rows that are measured while training; all are in the end."""
        return self.rows.get("validation")

    # ------------------------------------------------------------------------------------------------ results

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        """One prediction for each row of a batch; with `loss` (a sum) and `items` if the batch has labels."""
        raise NotImplementedError

    def preview(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        """What `predict` gives, in evaluations while training; a task may give it cheaper there."""
        return self.predict(model, batch)

    def score(self, predictions: Sequence[Prediction], rows) -> dict[str, float]:
        """Metrics over all `rows` at once."""
        raise NotImplementedError

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """A prediction in words and plain numbers, for a line of CSV or JSON."""
        raise NotImplementedError

    def lines(self, prediction: Prediction, index: int, rows, table: Dataset) -> list[dict[str, object]]:
        """What predict.py writes for one of `rows`, which `encode_inputs` made of `table`."""
        return [{**shown(table[index]), **self.describe(prediction)}]

    def written(self, model, *, seed: int) -> list[dict[str, str]]:
        """What a model writes that is given nothing to go by but a prompt: {"prompt", "text"}."""
        return []

    def samples(self, predictions: Sequence[Prediction], rows, count: int = 4) -> list[dict[str, str]]:
        """Some rows and what was predicted for them ({"prompt", "text"}): from all over, then the worst."""
        return []

    def figures(self, predictions: Sequence[Prediction], rows) -> list[dict[str, str]]:
        """Pictures for the report: {"title", "svg"}, or {"title", "png_base64"}."""
        return []

    def table(self, predictions: Sequence[Prediction], rows) -> str:
        """More than `score` says, for the terminal; empty: nothing."""
        return ""

    # ------------------------------------------------------------------------------------------------ in words

    @property
    def settled(self) -> dict[str, object]:
        """Settings that the data decided."""
        return {}

    def facts(self) -> dict[str, object]:
        """What the report and the model card say of the data."""
        args = self.args
        source = args.dataset or ", ".join(args.train_file or args.test_file or args.validation_file or [])
        name = args.data_name or Path(source).stem
        return {"name": name, "source": source, "licence": args.data_licence, **self.sizes()}

    def sizes(self) -> dict[str, dict[str, int]]:
        """Split -> what it holds, counted."""
        return {split: {"rows": len(rows)} for split, rows in self.rows.items()}

    def next_command(self, directory: Path) -> str:
        """What to type to see the result; pipeline() would give an adapter the labels of its base."""
        if (directory / "adapter_config.json").is_file():
            return f"accelerate launch recipes/evaluate.py --model {directory}"
        return (
            f'python -c "import bmtk; from transformers import pipeline; '
            f"print(pipeline('{self.about['pipeline_tag']}', model='{directory}')({self.example_input()}))\""
        )

    def example_input(self) -> str:
        """Python source of what `pipeline` may be called with."""
        return "'A text of your own.'"

    # ------------------------------------------------------------------------------------------------ inside

    def _tables(self, splits: Sequence[str]) -> dict[str, Dataset]:
        """The splits that there are; validation rows are held out of the training rows if none are given."""
        args = self.args
        if not splits:
            return {}
        if not (args.dataset or args.train_file or args.validation_file or args.test_file):
            raise ValueError("no data: set dataset (a folder, a file or a Hub id), or train_file")
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        tables = read_splits(args.dataset, files=files, splits=splits)
        self.holds_out = "train" in tables and "validation" in splits and "validation" not in tables
        if self.holds_out:
            tables |= self._held_out(tables["train"])
        return {split: tables[split] for split in SPLITS if split in tables}  # samples are of the last

    def _held_out(self, table: Dataset) -> dict[str, Dataset]:
        """The rows of `table` to train on and to validate by, none of a group among both."""
        share, column = self.args.validation_fraction, getattr(self.args, self.group_option)
        if column:
            check_column(table, column, option=self.group_option, where="train")
        groups, kind = rows_of_groups(table, column), f"values of {column!r}" if column else "training rows"
        count = round(len(groups) * share)
        if not 0 < count < len(groups):
            raise ValueError(f"{len(groups)} {kind} are too few to hold out {share:.0%} of them")
        parts = Dataset.from_dict({"group": range(len(groups))}).train_test_split(count, seed=self.seed)
        names = {"train": "train", "validation": "test"}
        found = {split: [groups[group] for group in parts[part]["group"]] for split, part in names.items()}
        tables = {split: table.select(np.concatenate(rows)) for split, rows in found.items()}
        together = f", the rows of {count:,} {kind}" if column else ""
        self.notes.append(
            f"there are no validation rows: {len(tables['validation']):,} of the {len(table):,} training rows are "
            f"held out{together} (validation_fraction={share}, seed {self.seed})"
        )
        return tables

    def _keep_apart(self) -> None:
        """See to it that no input is trained on that is measured on."""
        others = [split for split in self.rows if split != "train"]
        if "train" not in self.rows or not others:
            return
        seen = {
            mark: f"{split} row {row}"
            for split in others
            for row, mark in enumerate(fingerprints(self.rows[split], self.inputs), 1)
        }
        marks = fingerprints(self.rows["train"], self.inputs)
        leaks = [row for row, mark in enumerate(marks) if mark in seen]
        if not leaks:
            return
        found = (
            f"{len(leaks):,} of {len(marks):,} training rows have an input that is among the {' or '.join(others)} "
            f"rows (train row {leaks[0] + 1} is {seen[marks[leaks[0]]]})"
        )
        if self.args.leakage == "drop" or (self.args.leakage == "stop" and self.holds_out):
            kept = np.setdiff1d(np.arange(len(marks)), leaks)
            if not len(kept):
                raise ValueError(f"{found}; nothing would be left to train on")
            self.rows["train"] = self.rows["train"].select(kept)
            self.notes.append(f"{found}: left out of training")
        elif self.args.leakage == "allow":
            self.notes.append(f"{found}: the results on these are not honest")
        else:
            raise ValueError(f"{found}; leakage=drop leaves them out of training, leakage=allow trains on them")


def rows_of_groups(table: Dataset, column: str | None) -> list[np.ndarray]:
    """The rows of each value of `column`, in the order of their first rows; without one, every row by itself."""
    if column is None:
        return [*np.arange(len(table))[:, None]]
    found = {}
    for row, mark in enumerate(fingerprints(table, [column])):
        found.setdefault(mark, []).append(row)
    return [np.array(rows) for rows in found.values()]


def build_config(model_type: str, from_data: Mapping[str, object], chosen: Mapping[str, object]):
    """A configuration of `chosen` fields, over those of `from_data` that its class has."""
    config_class = CONFIG_MAPPING[model_type]
    known = known_fields(config_class)
    return config_class(**{**{name: value for name, value in from_data.items() if name in known}, **chosen})


def known_fields(config_class: type) -> set[str]:
    """Names that a configuration can be made with and means something by."""
    return {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)


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
