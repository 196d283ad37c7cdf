"""What the language-modelling tasks share: a corpus, a tokenizer, and token stores cut into rows."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from bmtk.data.batches import GlobalBatches, Rows
from bmtk.data.best_fit import BestFitRows, index_of
from bmtk.data.decontamination import TOLERATED_SHARE, SharedLines
from bmtk.data.downloads import is_url
from bmtk.data.fingerprints import FileDigests, Marks
from bmtk.data.held_out_texts import HeldOut, hold_out
from bmtk.data.masking import BLANKS
from bmtk.data.mixed_rows import MixedBatches, MixedRows
from bmtk.data.mixed_texts import MixedTexts, hold_out_of_each, mixed
from bmtk.data.mixture import MIXTURE, Mixture, Reading
from bmtk.data.packing import IGNORE_INDEX, PackedRows
from bmtk.data.sources import Texts, has_split, read_texts, text_fingerprint
from bmtk.data.tables import TextColumn, text_rows
from bmtk.data.token_store import TokenStore, build_token_store
from bmtk.data.tokenizer_training import train_on_sample
from bmtk.data.tokenizers import KINDS, keep_tokenizer, kept_tokenizer, load_tokenizer, mask_token
from bmtk.errors import UserError
from bmtk.files import read_json, write_json

from .corpus_arguments import HELD_OUT, CorpusArguments
from .objective import Objective
from .scorer import Scorer
from .task import Task
from .task_data import TaskData
from .texts import pad_texts

SAMPLE_CHARACTERS = 4 << 20  # of each split that a plan reads, where the corpus is not tokenised yet


class CorpusData(TaskData):
    """Texts and their tokenizer.  `rows` has the documents of each split; they are tokenised when they are bound.

    `model` is the model that training goes on with: its own tokenizer is read, never a new one.
    For a plan, a corpus that is not tokenised yet is read in part: `sampled_share` is the part of the training
    text that was read.
    """

    unit: ClassVar[str] = "file"
    needs_mask: ClassVar[bool] = False  # whether the tokenizer must have a token that hides another

    def __init__(self, task: Task, args: CorpusArguments, **reading: Any):
        self.temporary: tempfile.TemporaryDirectory[str] | None = None  # goes with the data
        super().__init__(task, args, **reading)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The named tokenizer, or one trained on the training text when it is first asked for.

        Not before: a run that goes on with other data is refused first.
        """
        return self._tokenizer()

    @cached_property
    def digests(self) -> FileDigests:
        """Of the files of the corpus, kept beside their tokens; a plan reads no file for them."""
        return FileDigests(
            None if self.is_plan and not self.corpus.is_dir() else self.corpus / ".digests.json",
            may_read=not self.is_plan,
        )

    @property
    def marks(self) -> Marks:
        return {
            split: texts.marks if isinstance(texts, Texts) else [text_fingerprint(texts)]
            for split, texts in self.rows.items()
        }

    @property
    def corpus(self) -> Path:
        """The folder of the tokenizer and the token stores."""
        if self.args.corpus_dir:
            return Path(self.args.corpus_dir)
        if self.folder is not None:
            return self.folder / "corpus"
        if self.temporary is None:
            self.temporary = tempfile.TemporaryDirectory()
        return Path(self.temporary.name)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        """Texts to predict from, as column "text"."""
        return text_rows(table, {"text": TextColumn(self.args.text_column, "text_column")}, where=where)

    @property
    def config_fields(self) -> dict[str, object]:
        return {
            "input_type": "tokens",
            "vocab_size": len(self.tokenizer),
            "max_position_embeddings": self.args.longest_row,
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def source_record(self) -> dict[str, object]:
        args = self.args
        mixture = [corpus.path for corpus in args.named_corpora.values()]
        source = ", ".join(args.train_file or mixture) or args.dataset or ", ".join(args.test_file or [])
        return {
            "name": args.data_name or Path(source).name,
            "source": source,
            "licence": args.data_licence,
            "tokenizer": f"{self.model or args.tokenizer}, {len(self.tokenizer)} tokens",
        }

    def prepare(self, log: Callable[[str], None]) -> None:
        """Tokenise every split into the corpus folder, with lines of progress; a plan keeps nothing there."""
        for split, texts in self.rows.items() if not self.is_plan else ():
            stores = self.stores_of(split, texts, self.corpus, log=log)
            for store in stores if split == "train" and self.args.packing == "best_fit" else ():
                index_of(store, self.args.context_length)
        if self.args.is_mixture and "train" in self.rows and not self.is_plan:
            items = zip(stores_of_split("train", self.rows["train"]), self.args.named_corpora.values(), strict=True)
            facts = [{"store": name, "weight": item.weight, "repeat": item.repeat} for name, item in items]
            write_json(self.corpus / MIXTURE, facts)

    def prepared(self) -> list[str]:
        names = [name for split, texts in self.rows.items() for name in stores_of_split(split, texts)]
        stores = {name: TokenStore(self.corpus / name) for name in names}
        lines = [f"{name:12}{s.num_documents:>12,} documents{s.num_tokens:>16,} tokens" for name, s in stores.items()]
        return [*lines, f"next: bmtk data show {self.corpus}, or bmtk pretrain with the same settings"]

    def stores_of(self, split: str, texts: Texts | Sequence[str], folder: Path, **options: Any) -> list[TokenStore]:
        """The stores of a split: one for each corpus of a mixture."""
        return [self.store_of(name, part, folder, **options) for name, part in stores_of_split(split, texts).items()]

    def store_of(self, split: str, texts: Texts | Sequence[str], folder: Path, **options: Any) -> TokenStore:
        """The tokens of a split, written if they are not there; what had to be left out is noted."""
        workers = self.args.prepare_workers
        store = build_token_store(texts, self.tokenizer, folder / split, workers=workers, **options)
        note = f"{split}: {store.left_out:,} rows or ends of files could not be read and are left out"
        if store.left_out and not any(line.startswith(note) for line in self.notes):
            self.notes.append(f"{note} (the first: {store.faults[0]}); `bmtk data show {store.directory}` lists them")
        return store

    # ------------------------------------------------------------------------------------------------ reading

    def _read(self, splits: Sequence[str]) -> dict[str, Any]:
        if "train" in splits:
            self._check_sources()
        texts = {split: self._texts(split) for split in splits if self._has(split)}
        self.holds_out = "train" in texts and "validation" in splits and "validation" not in texts
        if self.holds_out:
            found = self._held_out_texts(texts["train"])
            self.notes += [found.note] if found.note else []
            others = {split: part for split, part in texts.items() if split != "train"}
            texts = {"train": found.train, "validation": found.validation, **others}
        return {split: self._sample(part, split) for split, part in texts.items()} if self.is_plan else texts

    def _held_out_texts(self, texts: Texts) -> HeldOut:
        """What is held out of each corpus that has no validation text of its own."""
        fraction = self.args.validation_fraction or HELD_OUT
        own = {
            name: self._texts_of(corpus.path, "validation", corpus.text_column)
            for name, corpus in self.args.named_corpora.items()
            if has_split(corpus.path, "validation")
        }
        if isinstance(texts, MixedTexts):
            return hold_out_of_each(texts, own, fraction, self.seed)
        return HeldOut(texts, next(iter(own.values())), "") if own else hold_out(texts, fraction, self.seed)

    def _check_sources(self) -> None:
        if not self.args.dataset and not self.args.train_file and not self.args.corpora:
            raise UserError("no training text: set dataset (a folder, a file or a Hub id), train_file, or corpora")

    def _has(self, split: str) -> bool:
        """Whether there is a text of a split; a file, and a folder that names no splits, hold training text only."""
        dataset = self.args.dataset
        if split == "train" and self.args.corpora:
            return True
        if self.args.files[split] or dataset is None:
            return bool(self.args.files[split])
        is_local = Path(dataset).expanduser().exists() or is_url(dataset)
        return split == "train" or has_split(dataset, split) or (split == "validation" and not is_local)

    def _texts(self, split: str) -> Texts:
        if split != "train" or not self.args.corpora:
            return self._texts_of(self.args.files[split] or self.args.dataset, split)
        found = {
            name: self._texts_of(corpus.path, split, corpus.text_column)
            for name, corpus in self.args.named_corpora.items()
        }
        return mixed(found) if len(found) > 1 else next(iter(found.values()))

    def _texts_of(self, source: Any, split: str, text_column: str | None = None) -> Texts:
        args = self.args
        how = {"text_column": text_column or args.text_column, "sample_by": args.sample_by, "layout": args.layout}
        return read_texts(source, split=split, digests=self.digests, on_corrupt=args.on_corrupt or "stop", **how)

    def _sample(self, texts: Texts, split: str) -> Texts | list[str]:
        """For a plan: all of a corpus that is small or tokenised already, else its beginning."""
        if (texts.num_bytes or SAMPLE_CHARACTERS + 1) <= SAMPLE_CHARACTERS or self.is_tokenised(texts, split):
            return texts
        sample: Texts | list[str]
        if split == "train" and isinstance(texts, MixedTexts):
            sample = texts.sample(SAMPLE_CHARACTERS)
            is_whole = sample is texts
        else:
            sample = texts.head(SAMPLE_CHARACTERS)
            is_whole = sum(map(len, sample)) < SAMPLE_CHARACTERS  # a file holds more than its texts
        if is_whole:
            return texts
        num_bytes = sum(len(text.encode()) for text in sample)
        if split == "train" and texts.num_bytes:
            self.sampled_share = min(1.0, num_bytes / texts.num_bytes)
            self.notes.append(
                f"the plan reads the first {num_bytes / 1e6:.1f} MB of {texts.num_bytes / 1e6:,.1f} MB of training "
                "text: vocabulary, steps and time are estimates"
            )
        elif split == "train":
            self.notes.append(
                f"the plan reads the first {num_bytes / 1e6:.1f} MB of the training text, whose size is not known: "
                "its epochs are of that much text"
            )
        return sample

    def is_tokenised(self, texts: Texts, split: str) -> bool:
        """Whether all stores of a split are there."""
        manifests = {
            part.fingerprint: read_json(self.corpus / name / "manifest.json")
            for name, part in stores_of_split(split, texts).items()
        }
        return all(
            isinstance(manifest, dict) and manifest.get("source_fingerprint") == fingerprint
            for fingerprint, manifest in manifests.items()
        )

    def _keep_apart(self) -> None:
        """See to it that no text is trained on that is measured on; the answer for the same files is remembered."""
        measured = {split: texts for split, texts in self.rows.items() if split != "train"}
        if "train" not in self.rows or not measured or self.args.leakage == "allow" or self._is_known_to_be_apart():
            return
        shared = SharedLines(self.rows["train"], measured)
        shares = {split: share for split, share in shared.shares.items() if share > TOLERATED_SHARE}
        if not shares:
            if not self.is_plan:
                write_json(self.corpus / "apart.json", self._split_marks())
            return
        parts = " and ".join(f"{share:.0%} of the {split} text" for split, share in shares.items())
        found = (
            f"{parts}, in lines of 32 characters or more, is also in the training text "
            f"(for example {shared.example[:80]!r})"
        )
        if self.args.leakage != "drop":
            options = ("dataset", "corpora", "train_file", "validation_file", "test_file")
            given = {name: value for name in options if (value := getattr(self.args, name))}
            sources = ", ".join(
                f"{name}={value if isinstance(value, str) else ' '.join(value)}" for name, value in given.items()
            )
            raise UserError(
                f"{sources}: {found}; leakage=drop leaves its documents out of training, leakage=allow trains on them"
            )
        train = self.rows["train"]
        mark = "\n".join(self._split_marks())
        kept = train.without(shared.has_line_of, mark=mark) if isinstance(train, Texts) else train
        if not any(True for text in train if not shared.has_line_of(text)):
            raise UserError(f"{found}; nothing would be left to train on")
        self.rows["train"] = kept
        self.notes.append(f"{found}: the documents that hold it are left out of training")

    def _split_marks(self) -> list[str]:
        return [f"{split} {texts.fingerprint}" for split, texts in self.rows.items() if isinstance(texts, Texts)]

    def _is_known_to_be_apart(self) -> bool:
        return read_json(self.corpus / "apart.json") == self._split_marks()

    # ------------------------------------------------------------------------------------------------ tokenizer

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """The named tokenizer, or one trained on the training text (and kept only for this text)."""
        if self.model and Path(self.model).is_dir() and not (Path(self.model) / "config.json").is_file():
            raise UserError(f"model={self.model!r} is a folder without config.json; give one that holds a saved model")
        finished = self.model if self.args.tokenizer in KINDS else self.args.tokenizer
        if finished:
            return self._with_mask(load_tokenizer(finished, **self.loading), finished)
        texts = self.rows.get("train")
        if texts is None:
            raise UserError(f"tokenizer={self.args.tokenizer} needs a training text; name a finished tokenizer")
        kind = {"kind": self.args.tokenizer, "vocab_size": self.args.vocab_size, "with_mask": self.needs_mask}
        identity = {**kind, "texts": texts.fingerprint if isinstance(texts, Texts) else None}
        if kept := kept_tokenizer(self.corpus / "tokenizer", identity):
            return kept
        tokenizer, sample = train_on_sample(texts, **kind)
        if sample.num_bytes < sample.corpus_bytes:
            self.notes.append(f"the tokenizer is trained on {sample}")
        tokenizer.model_max_length = self.args.longest_row
        if not self.is_plan:
            keep_tokenizer(tokenizer, self.corpus / "tokenizer", identity)
        return tokenizer

    def _with_mask(self, tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
        """A finished tokenizer, with a mask token if need be.  Raises: UserError if a trained model lacks one."""
        if not self.needs_mask or tokenizer.mask_token is not None:
            return tokenizer
        if self.model:
            raise UserError(
                f"the tokenizer of {name} has no mask token, so that model was not trained to fill one in; start from "
                "a masked language model, or from scratch with tokenizer: <that folder>"
            )
        holds_blanks = any(token.startswith(BLANKS) for token in tokenizer.get_vocab())
        tokenizer.add_special_tokens({"mask_token": mask_token(words_hold_blanks=holds_blanks)})
        self.notes.append(
            f"the tokenizer has no mask token: {tokenizer.mask_token} (id {tokenizer.mask_token_id}) is new"
        )
        return tokenizer


def stores_of_split(split: str, texts: Any) -> dict[str, Any]:
    """The names of the stores of a split, each with its texts: corpora that are mixed in training are kept apart."""
    if split == "train" and isinstance(texts, MixedTexts):
        return {f"{split}.{name}": part for name, part in texts.members}
    return {split: texts}


class CorpusObjective(Objective):
    """Rows are cut from tokenised text.  Tokenises into the corpus folder what is not there yet."""

    data: CorpusData
    padding_side: ClassVar[str] = "right"  # of texts that are not packed

    def __init__(self, data: CorpusData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.tokenizer = data.tokenizer
        limit = getattr(config, "max_position_embeddings", None)
        if data.rows and limit is not None and self.args.longest_row > limit:
            raise UserError(
                f"context_length={self.args.longest_row} exceeds max_position_embeddings={limit}; "
                "lower it, or use a model with a larger limit"
            )
        if len(self.tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model knows vocab_size={config.vocab_size}; "
                "use the model's own tokenizer (tokenizer: <the model's folder>)"
            )
        # A plan keeps its tokens outside of the run's folder, unless it only opens what is there.
        self.keeps_order = self.args.is_mixture
        self.scratch = tempfile.TemporaryDirectory() if data.is_plan else None

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        return self.tokenizer

    def encode_splits(self) -> None:
        for split, texts in self.data.rows.items():
            is_sample = self.scratch is not None and not (
                isinstance(texts, Texts) and self.data.is_tokenised(texts, split)
            )
            folder = Path(self.scratch.name) if self.scratch is not None and is_sample else self.data.corpus
            members = [self.packed_rows(store, split) for store in self.data.stores_of(split, texts, folder)]
            if split == "train" and self.args.is_mixture:
                self.reading = self._reading([len(rows) for rows in members])
            self.rows[split] = self.of_packed(MixedRows(members) if len(members) > 1 else members[0], split)

    def packed_rows(self, store: TokenStore, split: str) -> PackedRows:
        """The rows of a store: what is measured is always cut, so that it does not depend on how training rows are."""
        length = self.row_length(split)
        if split != "train" or self.args.packing != "best_fit":
            return PackedRows(store, length)
        rows = BestFitRows(store, length, is_kept=not self.data.is_plan)
        self.notes.append(f"packing=best_fit, {store.directory.name}: {rows.described}")
        return rows

    def row_length(self, split: str) -> int:
        """Tokens of a row."""
        return int(self.args.context_length)

    def of_packed(self, rows: PackedRows, split: str) -> Any:
        """The rows of a split, made of packed ones."""
        return rows

    def _reading(self, sizes: Sequence[int]) -> Reading:
        corpora = self.args.named_corpora
        weights, repeats = zip(*((corpus.weight, corpus.repeat) for corpus in corpora.values()), strict=True)
        sampled = getattr(self.data.rows["train"], "sampled", ()) or [self.sampled_share] * len(sizes)
        whole = [round(size / share) for size, share in zip(sizes, sampled, strict=True)]
        return Reading(*(Mixture(list(corpora), weights, numbers, repeats) for numbers in (sizes, whole)))

    def train_batches(self, **sizes: Any) -> GlobalBatches:
        mixture = self.reading.mixture
        if mixture is None:
            return super().train_batches(**sizes)
        return MixedBatches(self.batch_rows(self.training_rows(), is_training=True), mixture=mixture, **sizes)

    def batch_rows(self, rows: Any, *, is_training: bool = False) -> Rows:
        return super().batch_rows(rows) if isinstance(rows, Dataset) else rows

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Leaves batches of packed rows as they are; pads texts to the longest of them."""

        def collate(rows: Any) -> dict[str, Any]:
            if isinstance(rows, dict):
                return rows
            texts = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
            return pad_texts(self.tokenizer, texts, padding_side=self.padding_side)

        return collate

    def num_items(self, batch: Mapping[str, Any]) -> Any:
        """Predicted tokens of a batch."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def num_units(self, batch: Mapping[str, Any]) -> Any:
        return self.num_items(batch)

    def units_per_row(self, split: str) -> float:
        return self.args.context_length

    def sizes(self) -> dict[str, dict[str, float]]:
        stores = {split: rows.store for split, rows in self.rows.items()}
        return {
            split: {"documents": store.num_documents, "tokens": store.num_tokens, "bytes": store.num_bytes}
            for split, store in stores.items()
        }

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), **self.reading.record()}


class CorpusScorer(Scorer):
    """Loss and perplexity of tokens."""

    metrics: Sequence[str] = ("loss", "perplexity")

    def __init__(self, objective: CorpusObjective):
        super().__init__(objective)
        self.args, self.tokenizer = objective.args, objective.tokenizer

    def measured_store(self) -> TokenStore:
        """The text that samples are taken from: of the validation rows, else of the test rows."""
        rows = self.objective.rows
        return rows["validation" if "validation" in rows else "test"].store
