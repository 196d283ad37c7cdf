"""Sequence classification: one label for a whole text.  Accuracy and macro-F1 over all predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bmtk.data.tables import check_column, read_splits
from bmtk.data.tokenizers import train_tokenizer

HEAD = "ForSequenceClassification"  # how the class of a model that has this head ends
TRAINED_KINDS = ("byte_bpe", "char")
LONGEST = 512  # tokens per text where neither tokenizer nor model states a limit


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class SequenceClassificationArguments:
    """Which texts and labels, and how many tokens of a text are read."""

    _argument_group_name = "data of sequence_classification"

    dataset: str | None = _setting(None, "folder with train, validation and test files, one file, or Hub id owner/name")
    train_file: list[str] | None = _setting(None, "training rows: .csv, .tsv, .jsonl, .json or .parquet; wins over dataset")
    validation_file: list[str] | None = _setting(None, "validation rows, likewise")
    test_file: list[str] | None = _setting(None, "test rows, likewise")
    validation_fraction: float = _setting(0.1, "share of the training rows held out where there are no validation rows")
    text_column: str = _setting("text", "column of the text")
    label_column: str = _setting("label", "column of the label: a string or an integer")
    label_names: list[str] | None = _setting(None, "names of the integer labels 0, 1, ... in that order")
    data_name: str | None = _setting(None, "what the model card calls the data; default: the source's own name")
    data_licence: str | None = _setting(None, "licence of the data, for the model card")
    tokenizer: str | None = _setting(
        None, "folder or Hub id; byte_bpe or char: train one on the training texts; default: the model's, else byte_bpe"
    )
    vocab_size: int = _setting(4096, "tokens of a tokenizer to be trained, at most")
    max_length: int | None = _setting(None, "tokens read per text, longer ones are cut; default: the model's limit")

    def __post_init__(self):
        if not (self.dataset or self.train_file or self.validation_file or self.test_file):
            raise ValueError("no data: set dataset (a folder, file or Hub id), or train_file")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} is not a share; choose between 0 and 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1 token")


class SequenceClassification:
    """The rows, labels, loss and metrics of one run.

    `notes` collects, in sentences, what was decided without being asked for.
    `model` is where the tokenizer comes from if no other is named.
    """

    arguments = SequenceClassificationArguments
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"

    def __init__(
        self, args: SequenceClassificationArguments, *, model: str | None = None, seed: int = 42, **loading: object
    ):
        self.args = args
        self.notes: list[str] = []
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        self.rows = {split: self._texts_and_labels(rows, split) for split, rows in self._splits(files, seed).items()}
        self.rows = {split: rows for split, rows in self.rows.items() if rows is not None}
        self.names = self._label_names()
        self.processor = self._tokenizer(model, loading)

    # ------------------------------------------------------------------------------------------------ the model

    @property
    def config_fields(self) -> dict[str, object]:
        """What the configuration of a new model takes from the data."""
        return {
            "vocab_size": len(self.processor),
            "bos_token_id": self.processor.bos_token_id,
            "eos_token_id": self.processor.eos_token_id,
        }

    def configure(self, config, labels: Sequence[str] | None = None) -> None:
        """Write labels, problem type and padding token into `config`, and turn texts into the model's rows.

        A classifier that knows the labels of the data (by name, or by number) keeps its own order of them; `labels`
        names the order of a model that does not say it in its configuration.
        Raises: ValueError if the model cannot read the rows, or a validation or test label is unknown.
        """
        known = list(labels) if labels else self._labels_of(config)
        ids = self._label_ids(known)
        self.labels = known if ids else self.names
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        config.problem_type = "single_label_classification"
        if config.pad_token_id is None:  # several models find a text's last token by it
            config.pad_token_id = self.processor.pad_token_id
        limit = self._longest(config)
        ids = ids or config.label2id
        self.rows = {split: self._encode(rows, split, ids, limit) for split, rows in self.rows.items()}

    def collator(self) -> DataCollatorWithPadding:
        """Pads the texts of a batch to the longest of them."""
        return DataCollatorWithPadding(self.processor)

    @staticmethod
    def loss(outputs, labels: torch.Tensor, num_items_in_batch=None, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross-entropy summed over the rows, divided by the rows of the whole optimizer step.

        Computed here because most classifiers of transformers accept `num_items_in_batch` and drop it: their loss and
        gradients grow with gradient accumulation.
        """
        total = F.cross_entropy(outputs["logits"].float(), labels, reduction="sum", label_smoothing=label_smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    # ------------------------------------------------------------------------------------------------ the metrics

    @staticmethod
    def reduce_logits(logits, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, K) to predicted label (B,) and loss in nats (B,): all that is kept of an evaluation batch."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits.argmax(-1), F.cross_entropy(logits.float(), labels, reduction="none")

    @staticmethod
    def metrics(prediction) -> dict[str, float]:
        """Loss, accuracy and macro-F1 over all rows at once, from what `reduce_logits` kept."""
        predicted, losses = prediction.predictions
        truth = prediction.label_ids
        return {
            "loss": float(losses.astype(np.float64).mean()),
            "accuracy": float((predicted == truth).mean()),
            "macro_f1": macro_f1(truth, predicted),
        }

    # ------------------------------------------------------------------------------------------------ the run's words

    def facts(self) -> dict[str, object]:
        """What the report and the model card say of the data."""
        source = self.args.dataset or ", ".join(self.args.train_file or self.args.test_file or self.args.validation_file)
        sizes = {split: {"rows": len(rows), "tokens": self._num_tokens(split)} for split, rows in self.rows.items()}
        return {
            "name": self.args.data_name or Path(source).stem,
            "source": source,
            "licence": self.args.data_licence,
            "labels": self.labels,
            **sizes,
        }

    def samples(self, predicted: np.ndarray, split: str, count: int = 4) -> list[dict[str, str]]:
        """The first texts of a split and the labels that they got."""
        rows = self.rows[split].select(range(min(count, len(self.rows[split]))))
        texts = self.processor.batch_decode(rows["input_ids"], skip_special_tokens=True)
        said = [(self.labels[p], self.labels[t]) for p, t in zip(predicted[:count], rows["labels"], strict=True)]
        verdicts = [p if p == t else f"{p} (labelled {t})" for p, t in said]
        return [{"prompt": text.strip(), "text": verdict} for text, verdict in zip(texts, verdicts, strict=True)]

    def next_command(self, directory: Path) -> str:
        """What to type to see the result."""
        return (
            f'python -c "import bmtk; from transformers import pipeline; '
            f"print(pipeline('text-classification', model='{directory}')('A text of your own.'))\""
        )

    def tokens_per_row(self, split: str) -> float:
        """Mean length of a text, tokens."""
        return self._num_tokens(split) / len(self.rows[split])

    def _num_tokens(self, split: str) -> int:
        return sum(map(len, self.rows[split]["input_ids"]))

    # ------------------------------------------------------------------------------------------------ rows

    def _splits(self, files: dict[str, list[str] | None], seed: int) -> dict[str, Dataset]:
        """The splits that there are; validation rows are taken from the training rows where there are no others."""
        splits = read_splits(self.args.dataset, files=files)
        if "train" in splits and "validation" not in splits:
            count = len(splits["train"])
            parts = splits["train"].train_test_split(self.args.validation_fraction, seed=seed) if count > 1 else {}
            if not parts or not len(parts["test"]):
                raise ValueError(f"{count} training rows are too few to hold out any for validation")
            splits |= {"train": parts["train"], "validation": parts["test"]}
            self.notes.append(
                f"there are no validation rows: {len(parts['test']):,} of the {count:,} training rows are held out "
                f"(validation_fraction={self.args.validation_fraction}, seed {seed})"
            )
        return splits

    def _texts_and_labels(self, rows: Dataset, split: str) -> Dataset | None:
        """Columns "text" and "label" (its name); rows without text are left out, a split without labels is None."""
        check_column(rows, self.args.text_column, option="text_column", where=split)
        check_column(rows, self.args.label_column, option="label_column", where=split)
        values = rows[self.args.label_column]
        kind = rows.features[self.args.label_column]
        if isinstance(kind, ClassLabel):
            if set(values) == {-1}:  # how the Hub marks a test set whose labels are secret
                self.notes.append(f"the {split} rows have no labels and are not used")
                return None
            values = [kind.names[value] if value is not None and value >= 0 else None for value in values]
        labels = [_label_name(value, self.args, f"{split} row {row}") for row, value in enumerate(values, 1)]
        texts = ["" if text is None else str(text) for text in rows[self.args.text_column]]
        kept = [row for row, text in enumerate(texts) if text and not text.isspace()]
        if not kept:
            raise ValueError(f"text_column={self.args.text_column!r} of the {split} data holds no text at all")
        if len(kept) < len(texts):
            self.notes.append(f"{len(texts) - len(kept)} of {len(texts):,} {split} rows have no text and are left out")
        return Dataset.from_dict({"text": [texts[row] for row in kept], "label": [labels[row] for row in kept]})

    def _label_names(self) -> list[str]:
        """The labels of the training rows (of all rows, if none are for training), numbers by size, words by alphabet."""
        if self.args.label_names:
            return self.args.label_names
        sources = [self.rows["train"]] if "train" in self.rows else self.rows.values()
        found = {name for rows in sources for name in rows["label"]}
        names = sorted(found, key=int) if all(map(_is_number, found)) else sorted(found)
        if len(names) < 2 and "train" in self.rows:
            raise ValueError(
                f"label_column={self.args.label_column!r} holds one label only, {names[0]!r}, in all training rows"
            )
        return names

    @staticmethod
    def _labels_of(config) -> list[str]:
        """The labels that a trained classifier knows, in its order; none for a model of another kind."""
        has_head = any(name.endswith(HEAD) for name in config.architectures or ())
        names = [config.id2label[index] for index in range(config.num_labels)] if has_head else []
        return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names

    def _label_ids(self, known: list[str]) -> dict[str, int] | None:
        """Label name -> id of a model that knows the labels `known`, or None if they are not the data's."""
        names = {name for rows in self.rows.values() for name in rows["label"]}
        if names <= set(known):
            return {name: index for index, name in enumerate(known)}
        if known and all(_is_number(name) and 0 <= int(name) < len(known) for name in names):
            return {str(index): index for index in range(len(known))}
        if known and "train" not in self.rows:
            raise ValueError(
                f"the data has labels that the model does not know: {_some(names - set(known))}; it knows {_some(known)}"
            )
        return None

    def _longest(self, config) -> int:
        """Tokens read per text."""
        stated = [self.processor.model_max_length, getattr(config, "max_position_embeddings", None)]
        stated = [limit for limit in stated if limit and limit < 10**9]  # tokenizers say 10**30 for "none"
        limit = min(stated, default=None)
        if limit and self.args.max_length and self.args.max_length > limit:
            raise ValueError(
                f"max_length={self.args.max_length} exceeds the model's limit of {limit} tokens; "
                "lower it, or use a model with a larger one"
            )
        return self.args.max_length or limit or LONGEST

    def _encode(self, rows: Dataset, split: str, ids: dict[str, int], limit: int) -> Dataset:
        unknown = set(rows["label"]) - set(ids)
        if unknown:
            first = next(row for row, name in enumerate(rows["label"], 1) if name in unknown)
            raise ValueError(
                f"the {split} data has labels that the training data does not have: {_some(unknown)} (first in row "
                f"{first}); known are {_some(ids)}"
            )

        def encode(batch: dict[str, list]) -> dict[str, list]:
            encoded = dict(self.processor(batch["text"], truncation=True, max_length=limit))
            whole = self.processor(batch["text"], verbose=False, return_attention_mask=False)["input_ids"]
            is_cut = [len(ids) > limit for ids in whole]
            return {**encoded, "labels": [ids[name] for name in batch["label"]], "is_cut": is_cut}

        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
        if num_cut := sum(encoded["is_cut"]):
            self.notes.append(
                f"{num_cut:,} of {len(rows):,} {split} texts ({num_cut / len(rows):.1%}) are longer than {limit} tokens "
                "and were cut"
            )
        return encoded.remove_columns("is_cut")

    def _tokenizer(self, model: str | None, loading: dict[str, object]):
        source = self.args.tokenizer or model or TRAINED_KINDS[0]
        if source in TRAINED_KINDS:
            if "train" not in self.rows:
                raise ValueError(f"tokenizer={source!r} is trained on training rows, and there are none; name a tokenizer")
            return train_tokenizer(self.rows["train"]["text"], kind=source, vocab_size=self.args.vocab_size)
        tokenizer = AutoTokenizer.from_pretrained(source, **loading)
        if tokenizer.pad_token is None:
            stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
            if stand_in is None:
                raise ValueError(f"the tokenizer {source} has no padding token, nor another that could stand in for it")
            tokenizer.pad_token = stand_in
            self.notes.append(f"the tokenizer has no padding token: {stand_in!r} stands in for it")
        return tokenizer


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the labels of 2 TP / (2 TP + FP + FN); labels that occur in neither array are left out."""
    scores = []
    for label in np.union1d(truth, predicted):
        hits = np.sum((truth == label) & (predicted == label))
        scores.append(2 * hits / (np.sum(truth == label) + np.sum(predicted == label)))
    return float(np.mean(scores))


def _label_name(value: object, args: SequenceClassificationArguments, where: str) -> str:
    """The label as a word; integers are looked up in `label_names`, if these are given."""
    if isinstance(value, float) and value.is_integer():  # a column of integers with a gap somewhere
        value = int(value)
    if isinstance(value, float) and not np.isnan(value):
        raise ValueError(f"{where}: label_column={args.label_column!r} holds {value}; a label is a string or an integer")
    if value is None or value == "" or isinstance(value, float):
        raise ValueError(f"{where}: label_column={args.label_column!r} is empty; label the row or take it out")
    name = str(value)
    if not args.label_names or name in args.label_names:
        return name
    if not _is_number(name) or not 0 <= int(name) < len(args.label_names):
        raise ValueError(f"{where}: label {name!r} is neither in label_names ({_some(args.label_names)}) nor a number of one")
    return args.label_names[int(name)]


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _some(names) -> str:
    names = list(names) if not isinstance(names, set) else sorted(names)
    return ", ".join(map(repr, names[:10])) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
