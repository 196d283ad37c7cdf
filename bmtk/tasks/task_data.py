"""Rows as they were read: columns under the task's own names, split, and with no row in two splits."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bmtk.data.decontamination import Leaks
from bmtk.data.fingerprints import Marks, differences, fingerprints, row_marks
from bmtk.data.tables import SPLITS, check_column, read_splits
from bmtk.data.text_files import TableFormat
from bmtk.data.tokenizers import tokenizer_fingerprint
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .task import Task

if TYPE_CHECKING:
    from .label_types import LabelType
    from .objective import Objective

LEAKAGE = ("stop", "drop", "allow")


@dataclass
class SourceArguments:
    """Where the data are, and what they are called."""

    dataset: str | None = setting(
        None,
        "folder with train, validation and test parts, a file, a pattern ('{train,val}-*.tar'), or Hub id owner/name",
    )
    train_file: list[str] | None = setting(
        None,
        "training rows: .csv, .tsv, .jsonl, .json (each also .gz, .bz2, .xz, .zst), .parquet, .tar, and patterns of "
        "them; over dataset",
    )
    validation_file: list[str] | None = setting(None, "validation rows, likewise")
    test_file: list[str] | None = setting(None, "test rows, likewise")
    delimiter: str | None = fact(
        None, "what divides the cells of .csv and .tsv files: a character or tab; default: found in .csv, tab in .tsv"
    )
    encoding: str | None = fact(
        None, "of text files without a byte-order mark, such as windows-1252 or gbk; default: utf-8"
    )
    leakage: str = setting(
        "stop", "training rows whose input is also among the validation or test rows: stop, drop (them) or allow"
    )
    data_name: str | None = fact(None, "name of the data on the model card; default: the source's own name")
    data_licence: str | None = fact(None, "licence of the data, for the model card")

    # Of a config file that is about other data: what was not used of it, and settings of columns that were.
    remarks: Sequence[str] = dataclasses.field(default=(), init=False, compare=False, repr=False)
    borrowed_columns: Sequence[str] = dataclasses.field(default=(), init=False, compare=False, repr=False)

    # Settings that may differ when a run is resumed: they change what is shown, not what is learned.
    free_keys: ClassVar[frozenset[str]] = frozenset(("data_name", "data_licence"))

    def __post_init__(self) -> None:
        self.check_layout()
        if self.leakage not in LEAKAGE:
            raise UserError(f"leakage={self.leakage!r} is unknown; choose one of {', '.join(LEAKAGE)}")

    def check_layout(self) -> None:
        """Raise UserError for a delimiter or an encoding that there is not."""
        _ = self.layout

    @property
    def layout(self) -> TableFormat:
        """How text tables are written."""
        return TableFormat(self.delimiter, self.encoding)

    def settings_that_change(self, metric: str) -> dict[str, str]:
        """Settings that change what `metric` measures, each with how: no search may choose between models by them."""
        return {}

    @property
    def decided_main_metric(self) -> str | None:
        """The metric by which models are compared, where the task leaves it to settings, and these decide it."""
        return None

    @property
    def files(self) -> dict[str, list[str] | None]:
        """Split -> the files that are named for it."""
        return {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}


@dataclass
class DataArguments(SourceArguments):
    """Also how rows are held out."""

    validation_fraction: float = setting(0.1, "share of the training rows held out if no validation rows are given")
    group_column: str | None = fact(
        None, "rows with the same value here, such as a speaker, are held out together; of questions: their text"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} is not a share; choose between 0 and 1")


class TaskData:
    """The rows of one run.  The constructor reads them; a subclass has `read_rows`.

    A subclass that keeps more than rows calls this constructor from its own: what `read_rows` fills in is made before
    the call, what comes of all rows together (the labels' names, a tokenizer) after it.
    """

    inputs: ClassVar[tuple[str, ...]]  # columns of `read_rows` that make two rows the same
    cuts_one_table: ClassVar[bool] = False  # whether a single table holds the rows of all splits

    def __init__(
        self,
        task: Task,
        args: Any,
        *,
        model: str | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 42,
        folder: Path | None = None,
        is_plan: bool = False,
        **loading: Any,
    ):
        """`model` is the folder or Hub id whose processor is read if `args` name no other; of `splits`, those that
        exist are read (none: data for `encode_inputs` only).  `folder` is where a task may keep what it prepares;
        with `is_plan` nothing is kept, and a large corpus may be read in part; `loading` is for `from_pretrained`.
        """
        self.task, self.args, self.model = task, args, model
        self.seed, self.folder, self.is_plan, self.loading = seed, folder, is_plan, loading
        self.notes: list[str] = list(
            args.remarks
        )  # what was found in the data, and what was decided without being asked for
        self.holds_out = False  # whether the validation rows were training rows
        self.sampled_share = 1.0  # the part of the training data that was read: below 1 only for a plan
        self.rows: dict[str, Any] = self._read(splits)
        self._keep_apart()

    # ------------------------------------------------------------------------------------------------ for subclasses

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Any:
        """The columns of `table` that the task reads, under its own names; None for a split without labels.

        `where` names the rows in errors ("train").  Raises: UserError for a column or value that cannot be used.
        """
        raise NotImplementedError

    def readable_rows(self, table: Dataset, where: str) -> Dataset:
        """Those rows of `table` that can be read at all, before some are held out; also of rows to be predicted."""
        return table

    def prepare(self, log: Callable[[str], None]) -> None:
        """Make of the rows what takes long and is kept, before other processes ask for it; `log` shows progress."""

    def prepared(self) -> list[str]:
        """What `prepare` has made, in lines."""
        return [f"there is nothing to prepare for task {self.task.name}: it reads its rows as they are"]

    @property
    def group_option(self) -> str:
        """The setting that names the column whose values are held out with all of their rows."""
        return "group_column"

    @property
    def label_type(self) -> "LabelType | None":
        """What the labels of rows are (one, several, a number), for a task that has them: decides metrics and loss."""
        return None

    @property
    def config_fields(self) -> dict[str, object]:
        """What the configuration of a new model takes from the data."""
        return {}

    # ------------------------------------------------------------------------------------------------ binding

    def new_config(
        self, model_type: str, chosen: Mapping[str, object], *, preset: str | None = None
    ) -> PreTrainedConfig:
        """The configuration of a new model: `chosen` fields over those of a preset over what the data say.

        Which tokens there are is decided by the data, whatever the preset says.
        """
        tokens = {k: v for k, v in self.config_fields.items() if k == "vocab_size" or k.endswith("_token_id")}
        config_class: Any = CONFIG_MAPPING[model_type]
        of_preset = config_class.presets[preset] if preset else {}
        return build_config(model_type, {**self.config_fields, **of_preset, **tokens}, chosen)

    def bind(self, config: PreTrainedConfig, *, labels: Sequence[str] = ()) -> "Objective":
        """Write into `config` what the data decide, and encode the rows for it.

        `labels` are those of a model whose configuration does not name them: an adapter's.
        Raises: UserError if the model cannot read the rows.
        """
        objective = self.task.objective(self, config, labels=labels)
        objective.encode_splits()
        return objective

    # ------------------------------------------------------------------------------------------------ in words

    @property
    def main_metric(self) -> str:
        return self.label_type.main_metric if self.label_type else str(self.task.main_metric)

    @property
    def about(self) -> dict[str, str | None]:
        """As `Task.about`, with what the rows decide."""
        return {**self.task.about, **(self.label_type.about if self.label_type else {})}

    unit: ClassVar[str] = "row"  # what `marks` has one of, in words

    @property
    def marks(self) -> Marks:
        """Split -> a mark of each row that was read: two data sets with the same marks hold the same."""
        return {split: row_marks(rows) for split, rows in self.rows.items()}

    @property
    def tokenizer_mark(self) -> str | None:
        """A mark of the tokenizer, where the data have one."""
        tokenizer = getattr(self, "tokenizer", None)
        return tokenizer_fingerprint(tokenizer) if tokenizer is not None else None

    @property
    def text_bytes(self) -> float | None:
        """Size of the training text; None where there is none, or only reading it would show that."""
        texts = self.rows.get("train")
        if isinstance(texts, list):  # a sample, for a plan
            whole = sum(len(text.encode()) for text in texts) / self.sampled_share
            return None if self.sampled_share == 1 else whole
        return getattr(texts, "num_bytes", None)

    def differences(self, former: Marks) -> list[str]:
        """In what the data differ from those with the marks `former`, in words."""
        return differences(former, self.marks, unit=self.unit)

    def source_record(self) -> dict[str, object]:
        """Name, source and licence of the data."""
        args = self.args
        source = args.dataset or ", ".join(args.train_file or args.test_file or args.validation_file or [])
        return {"name": args.data_name or Path(source).stem, "source": source, "licence": args.data_licence}

    # ------------------------------------------------------------------------------------------------ reading

    def _read(self, splits: Sequence[str]) -> dict[str, Any]:
        tables = self._tables(splits)
        self._use_own_columns(tables)
        tables = {split: self.readable_rows(table, split) for split, table in tables.items()}
        tables = self._with_validation(tables, splits)
        read = {split: self.read_rows(table, split, labelled=True) for split, table in tables.items()}
        return {split: rows for split, rows in read.items() if rows is not None}

    def _use_own_columns(self, tables: Mapping[str, Dataset]) -> None:
        """Read the usual column where the one that a config file names for other data is not there."""
        there = {column for table in tables.values() for column in table.column_names}
        borrowed = self.args.borrowed_columns if tables else ()
        for key in borrowed:
            usual = type(self.args).__dataclass_fields__[key].default
            if getattr(self.args, key) not in there and (usual is None or usual in there):
                setattr(self.args, key, usual)
        if borrowed:
            self.notes.append(f"columns: {', '.join(f'{key}={getattr(self.args, key)}' for key in borrowed)}")

    def _tables(self, splits: Sequence[str]) -> dict[str, Dataset]:
        """The splits that there are files of."""
        if not splits:
            return {}
        if not (self.args.dataset or any(self.args.files.values())):
            raise UserError("no data: set dataset (a folder, a file or a Hub id), or train_file")
        return read_splits(
            self.args.dataset, files=self.args.files, splits=splits, layout=self.args.layout, notes=self.notes
        )

    def _with_validation(self, tables: dict[str, Dataset], splits: Sequence[str]) -> dict[str, Dataset]:
        """Validation rows are held out of the training rows if none are given."""
        self.holds_out = "train" in tables and "validation" in splits and "validation" not in tables
        if self.holds_out:
            tables |= self._held_out(tables["train"])
        return {split: tables[split] for split in SPLITS if split in tables}  # samples are of the last

    def _held_out(self, table: Dataset) -> dict[str, Dataset]:
        """The rows of `table` to train on and to validate by, none of a group among both."""
        share, column = self.args.validation_fraction, getattr(self.args, self.group_option)
        if column:
            check_column(table, column, option=self.group_option, where="train")
        groups, kind = None, "training rows"
        if column:
            groups, kind = rows_of_groups(table, column), f"values of {column!r}"
        number = len(table) if groups is None else len(groups)
        count = round(number * share)
        if not 0 < count < number:
            raise UserError(f"{number} {kind} are too few to hold out {share:.0%} of them")
        order, tables = np.random.default_rng(self.seed).permutation(number), {}  # as Dataset.train_test_split does
        for split, chosen in (("train", order[count:]), ("validation", order[:count])):
            rows = chosen if groups is None else np.concatenate([groups[group] for group in chosen])
            tables[split] = table.select(rows)
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
        marks = {split: self._fingerprints(split) for split in ("train", *others)}
        leaks = Leaks(marks.pop("train"), marks)
        if not leaks.rows:
            return
        if self.args.leakage == "drop" or (self.args.leakage == "stop" and self.holds_out):
            if not len(leaks.kept):
                raise UserError(f"{leaks.sentence}; nothing would be left to train on")
            self.rows["train"] = self.rows["train"].select(leaks.kept)
            self.notes.append(f"{leaks.sentence}: left out of training")
        elif self.args.leakage == "allow":
            self.notes.append(f"{leaks.sentence}: the results on these are not honest")
        else:
            raise UserError(
                f"{leaks.sentence}; leakage=drop leaves them out of training, leakage=allow trains on them"
            )

    def _fingerprints(self, split: str) -> list[bytes]:
        return fingerprints(self.rows[split], self.inputs)


def rows_of_groups(table: Dataset, column: str) -> list[np.ndarray]:
    """The rows of each value of `column`, in the order of their first rows."""
    found: dict[bytes, list[int]] = {}
    for row, mark in enumerate(fingerprints(table, [column])):
        found.setdefault(mark, []).append(row)
    return [np.array(rows) for rows in found.values()]


def build_config(model_type: str, from_data: Mapping[str, object], chosen: Mapping[str, object]) -> PreTrainedConfig:
    """A configuration of `chosen` fields, over those of `from_data` that its class has."""
    config_class: Any = CONFIG_MAPPING[model_type]
    known = known_fields(config_class)
    return config_class(**{**{name: value for name, value in from_data.items() if name in known}, **chosen})


def known_fields(config_class: Any) -> set[str]:
    """Names that a configuration can be made with and means something by."""
    return {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
