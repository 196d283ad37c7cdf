"""Sequence classification: one label for a whole text.  Accuracy and macro-F1 over all predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from bmtk.data.labels import ids_of_known, in_order, label_name, some
from bmtk.data.tables import SPLITS, check_column, read_splits
from bmtk.data.tokenizers import train_tokenizer

HEAD = "ForSequenceClassification"  # how the class of a model that has this head ends
TRAINED_KINDS = ("byte_bpe", "char")
LONGEST = 512  # tokens read of a text where neither tokenizer nor model states a limit


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class SequenceClassificationArguments:
    """Which texts and labels, and how many tokens of a text are read."""

    _argument_group_name = "data of sequence_classification"

    dataset: str | None = _setting(None, "folder with train, validation and test files, a file, or Hub id owner/name")
    train_file: list[str] | None = _setting(None, "training rows: .csv, .tsv, .jsonl, .json, .parquet; over dataset")
    validation_file: list[str] | None = _setting(None, "validation rows, likewise")
    test_file: list[str] | None = _setting(None, "test rows, likewise")
    validation_fraction: float = _setting(0.1, "share of training rows held out where no validation rows are given")
    text_column: str = _setting("text", "column of the text")
    label_column: str = _setting("label", "column of the label: a string or an integer")
    label_names: list[str] | None = _setting(None, "names of the integer labels 0, 1, ... in that order")
    data_name: str | None = _setting(None, "what the model card calls the data; default: the source's own name")
    data_licence: str | None = _setting(None, "licence of the data, for the model card")
    tokenizer: str | None = _setting(
        None, "folder or Hub id; byte_bpe or char: train one on these texts; default: the model's own, else byte_bpe"
    )
    vocab_size: int = _setting(4096, "tokens of a tokenizer to be trained, at most")
    max_length: int | None = _setting(None, "tokens read per text, longer ones are cut; default: the model's limit")

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} is not a share; choose between 0 and 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1 token")


class SequenceClassification:
    """The rows, labels, loss and metrics of one run.

    `model` is where the tokenizer comes from if `args` name no other; of `splits`, those are read that are there.
    `notes` collects, in sentences, what was decided without being asked for.
    """

    name = "sequence_classification"
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "text-classification",
        "auto_class": "AutoModelForSequenceClassification",
        "noun": "text classifier",
        "limits": "It knows only the labels it was trained with, and its scores are not calibrated probabilities. "
        "Expect lower accuracy on text that differs from its training data.",
    }
    arguments = SequenceClassificationArguments
    auto_class = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    free_keys = frozenset(("data_name", "data_licence"))  # may differ when a run is resumed

    def __init__(
        self,
        args: SequenceClassificationArguments,
        *,
        model: str | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 42,
        **loading: object,
    ):
        self.args = args
        self.notes: list[str] = []
        rows = {split: self._texts_and_labels(rows, split) for split, rows in self._read(splits, seed).items()}
        self.rows = {split: rows for split, rows in rows.items() if rows is not None}
        self.names = self._label_names()
        self.processor = self._tokenizer(model, loading)

    # ------------------------------------------------------------------------------------------------ the model

    @property
    def config_fields(self) -> dict[str, object]:
        """What the configuration of a new model takes from the data."""
        ends = {"bos_token_id": self.processor.bos_token_id, "eos_token_id": self.processor.eos_token_id}
        return {"vocab_size": len(self.processor), **ends}

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Write labels, problem type and padding token into `config`, and turn the texts into the model's rows.

        A classifier that knows the labels of the data, by name or by number, keeps its own order of them; `labels` is
        that order for a model whose configuration does not say it.
        Raises: ValueError if the model cannot read the rows, or a validation or test label is unknown.
        """
        known = list(labels) or _labels_of(config)
        ids = ids_of_known({name for rows in self.rows.values() for name in rows["label"]}, known)
        if ids is None and known and "train" not in self.rows:
            raise ValueError(f"the data has labels {some(self.names)}, and the model knows others: {some(known)}")
        self.labels = known if ids else self.names
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        config.problem_type = "single_label_classification"
        if config.pad_token_id is None:  # several models find a text's last token by it
            config.pad_token_id = self.processor.pad_token_id
        if len(self.processor) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.processor)} tokens, the model knows vocab_size={config.vocab_size}; "
                "leave tokenizer out to use the model's own"
            )
        limit = self._longest(config)
        self.rows = {
            split: self._encode(rows, split, ids or config.label2id, limit) for split, rows in self.rows.items()
        }

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
        """Loss, accuracy and macro-F1 over all rows at once, from what `reduce_logits` kept.

        The loss is here because Trainer's own is a mean of batch means, in which rows that fill up the last batches of
        several processes count too.
        """
        predicted, losses = prediction.predictions
        truth = prediction.label_ids
        return {
            "loss": float(losses.astype(np.float64).mean()),
            "accuracy": float((predicted == truth).mean()),
            "macro_f1": float(np.mean([row["f1"] for row in scores_by_label(truth, predicted)])),
        }

    # ------------------------------------------------------------------------------------------------ in words

    def facts(self) -> dict[str, object]:
        """What the report and the model card say of the data."""
        args = self.args
        source = args.dataset or ", ".join(args.train_file or args.test_file or args.validation_file)
        sizes = {split: {"rows": len(rows), "tokens": self._num_tokens(split)} for split, rows in self.rows.items()}
        name = args.data_name or Path(source).stem
        return {"name": name, "source": source, "licence": args.data_licence, "labels": self.labels, **sizes}

    def samples(self, predicted: np.ndarray, split: str, count: int = 4) -> list[dict[str, str]]:
        """Texts from all over a split, and the labels that they got."""
        chosen = np.linspace(0, len(predicted) - 1, min(count, len(predicted))).astype(int)
        rows = self.rows[split].select(chosen)
        texts = self.processor.batch_decode(list(rows["input_ids"]), skip_special_tokens=True)
        said = [(self.labels[p], self.labels[t]) for p, t in zip(predicted[chosen], rows["labels"], strict=True)]
        verdicts = [f" -> {p}" if p == t else f" -> {p} (labelled {t})" for p, t in said]
        return [{"prompt": text.strip(), "text": verdict} for text, verdict in zip(texts, verdicts, strict=True)]

    def table(self, prediction) -> str:
        """Rows, precision, recall and F1 of each label, for the terminal."""
        scores = scores_by_label(prediction.label_ids, prediction.predictions[0])
        width = max(len("label"), *map(len, self.labels))
        lines = [f"  {'label':<{width}}  {'rows':>7}  precision  recall     F1"]
        lines += [
            f"  {self.labels[row['label']]:<{width}}  {row['rows']:>7,}  {row['precision']:9.4f}  {row['recall']:6.4f}"
            f"  {row['f1']:.4f}"
            for row in scores
        ]
        return "\n".join(lines)

    def next_command(self, directory: Path) -> str:
        """What to type to see the result; pipeline() would give an adapter the labels of its base."""
        if (directory / "adapter_config.json").is_file():
            return f"accelerate launch recipes/evaluate.py --model {directory}"
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

    def _read(self, splits: Sequence[str], seed: int) -> dict[str, Dataset]:
        """The splits that there are; validation rows are held out of the training rows if none are given."""
        args = self.args
        if not (args.dataset or args.train_file or args.validation_file or args.test_file):
            raise ValueError("no data: set dataset (a folder, a file or a Hub id), or train_file")
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        rows = read_splits(args.dataset, files=files, splits=splits)
        if "train" in rows and "validation" in splits and "validation" not in rows:
            count = len(rows["train"])
            held_out = round(count * args.validation_fraction)
            if not 0 < held_out < count:
                raise ValueError(
                    f"{count} training rows are too few to hold out {args.validation_fraction:.0%} of them"
                )
            parts = rows["train"].train_test_split(held_out, seed=seed)
            rows |= {"train": parts["train"], "validation": parts["test"]}
            self.notes.append(
                f"there are no validation rows: {held_out:,} of the {count:,} training rows are held out "
                f"(validation_fraction={args.validation_fraction}, seed {seed})"
            )
        return rows

    def _texts_and_labels(self, rows: Dataset, split: str) -> Dataset | None:
        """Columns "text" and "label" (its name); rows without text are left out, a split without labels is None."""
        args = self.args
        check_column(rows, args.text_column, option="text_column", where=split)
        check_column(rows, args.label_column, option="label_column", where=split)
        values, kind = list(rows[args.label_column]), rows.features[args.label_column]
        if isinstance(kind, ClassLabel):
            if set(values) == {-1}:  # how the Hub marks a test set whose labels are secret
                self.notes.append(f"the {split} rows have no labels and are not used")
                return None
            values = [kind.names[value] if value is not None and value >= 0 else None for value in values]
        where = f"label_column={args.label_column!r} of {split} row"
        labels = [label_name(value, args.label_names, f"{where} {row}") for row, value in enumerate(values, 1)]
        texts = ["" if text is None else str(text) for text in rows[args.text_column]]
        kept = [row for row, text in enumerate(texts) if text and not text.isspace()]
        if not kept:
            raise ValueError(f"text_column={args.text_column!r} of the {split} data holds no text at all")
        if len(kept) < len(texts):
            self.notes.append(f"{len(texts) - len(kept):,} of {len(texts):,} {split} rows have no text: left out")
        return Dataset.from_dict({"text": [texts[row] for row in kept], "label": [labels[row] for row in kept]})

    def _label_names(self) -> list[str]:
        """The labels of the training rows; of all rows, if none are for training."""
        if self.args.label_names:
            return self.args.label_names
        sources = [self.rows["train"]] if "train" in self.rows else self.rows.values()
        names = in_order({name for rows in sources for name in rows["label"]})
        if len(names) < 2 and "train" in self.rows:
            raise ValueError(f"label_column={self.args.label_column!r} holds {names[0]!r} in all training rows")
        return names

    def _longest(self, config) -> int:
        """Tokens read per text."""
        stated = [self.processor.model_max_length, getattr(config, "max_position_embeddings", None)]
        limit = min((tokens for tokens in stated if tokens and tokens < 10**9), default=None)  # 10**30 means "none"
        if limit and self.args.max_length and self.args.max_length > limit:
            raise ValueError(
                f"max_length={self.args.max_length} exceeds the model's limit of {limit} tokens; lower it, or use a "
                "model with a larger one"
            )
        return self.args.max_length or limit or LONGEST

    def _encode(self, rows: Dataset, split: str, ids: Mapping[str, int], limit: int) -> Dataset:
        unknown = set(rows["label"]) - set(ids)
        if unknown:
            first = next(row for row, name in enumerate(rows["label"], 1) if name in unknown)
            raise ValueError(
                f"the {split} data has labels that the training data does not have: {some(unknown)} (first in row "
                f"{first}); known are {some(ids)}"
            )

        def encode(batch: dict[str, list]) -> dict[str, list]:
            whole = self.processor(batch["text"], verbose=False, return_attention_mask=False)["input_ids"]
            encoded = self.processor(batch["text"], truncation=True, max_length=limit)
            labels = [ids[name] for name in batch["label"]]
            return {**encoded, "labels": labels, "is_cut": [len(tokens) > limit for tokens in whole]}

        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
        if cut := sum(encoded["is_cut"]):
            share = f"{cut:,} of {len(rows):,} {split} texts ({cut / len(rows):.1%})"
            self.notes.append(f"{share} are longer than {limit} tokens and were cut")
        return encoded.remove_columns("is_cut")

    def _tokenizer(self, model: str | None, loading: dict[str, object]):
        source = self.args.tokenizer or model or TRAINED_KINDS[0]
        if source in TRAINED_KINDS:
            if "train" not in self.rows:
                raise ValueError(f"tokenizer={source} needs training rows to be trained on; name a finished tokenizer")
            return train_tokenizer(self.rows["train"]["text"], kind=source, vocab_size=self.args.vocab_size)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **loading)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"no tokenizer can be loaded from {source!r}: {reason}; name one with tokenizer"
            ) from error
        if tokenizer.pad_token is None:
            stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
            if stand_in is None:
                raise ValueError(
                    f"the tokenizer {source} has no padding token, nor another that could stand in for it"
                )
            tokenizer.pad_token = stand_in
            self.notes.append(f"the tokenizer has no padding token: {stand_in!r} stands in for it")
        return tokenizer


def scores_by_label(truth: np.ndarray, predicted: np.ndarray) -> list[dict[str, float]]:
    """Rows, precision, recall and F1 of each label id that occurs in either array; 0 where a ratio has no cases."""
    scores = []
    for label in np.union1d(truth, predicted):
        is_true, is_predicted = truth == label, predicted == label
        hits, rows, calls = (is_true & is_predicted).sum(), is_true.sum(), is_predicted.sum()
        ratios = {"precision": hits / max(calls, 1), "recall": hits / max(rows, 1), "f1": 2 * hits / (rows + calls)}
        scores.append(
            {"label": int(label), "rows": int(rows), **{name: float(ratio) for name, ratio in ratios.items()}}
        )
    return scores


def _labels_of(config) -> list[str]:
    """The labels that a trained classifier knows, in its order; none for other models, or if it has only numbers."""
    if not any(name.endswith(HEAD) for name in config.architectures or ()):
        return []
    names = [config.id2label[index] for index in range(config.num_labels)]
    return [] if names == [f"LABEL_{index}" for index in range(len(names))] else names
