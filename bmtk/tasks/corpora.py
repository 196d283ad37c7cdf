"""What the language-modelling tasks share: a corpus, a tokenizer, and token stores cut into rows."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bmtk.data.masking import BLANKS
from bmtk.data.packing import PackedRows
from bmtk.data.sources import Texts, has_split, read_texts
from bmtk.data.tables import SPLITS, check_column
from bmtk.data.token_store import TokenStore, build_token_store
from bmtk.data.tokenizers import KINDS, mask_token, train_tokenizer
from bmtk.settings import setting

from .task import Task
from .texts import pad_texts


@dataclass
class CorpusArguments:
    """Which text, which tokenizer, how much context."""

    dataset: str | None = setting(None, "folder or Hub id (owner/name) with a train and a validation split")
    train_file: list[str] | None = setting(None, "training text: .txt, .jsonl, .csv or .parquet files, or folders")
    validation_file: list[str] | None = setting(None, "validation text, likewise")
    test_file: list[str] | None = setting(None, "text of the final test, likewise; default: that of dataset, if any")
    text_column: str = setting("text", "column that holds the text (.jsonl, .csv, .parquet, Hub)")
    sample_by: str = setting("document", "make one document of each .txt file ('document') or of each 'line'")
    data_name: str | None = setting(None, "what the model card calls the data; default: the source's own name")
    data_licence: str | None = setting(None, "licence of the data, for the model card")
    tokenizer: str = setting(
        "byte_bpe", "byte_bpe, char, word or uncased_word: train one; or folder or Hub id of a finished one"
    )
    vocab_size: int = setting(4096, "tokens of a tokenizer to be trained, at most")
    context_length: int = setting(256, "tokens per row")
    corpus_dir: str | None = setting(None, "folder for the tokenised text; default: <output_dir>/corpus")

    def __post_init__(self):
        if self.context_length < 1:
            raise ValueError(f"context_length={self.context_length} must be at least 1 token")


class CorpusTask(Task):
    """A task whose rows are cut from tokenised text.  Tokenises into `folder` what is not there yet.

    `model` is the model that training goes on with: its own tokenizer is read, never a new one.
    """

    unit = "tokens"
    # Settings that change what is shown, not what is learned: they may differ when a run is resumed.
    free_keys = frozenset(("corpus_dir", "data_name", "data_licence"))
    metrics = ("loss", "perplexity")
    main_metric = "loss"
    padding_side: ClassVar[str] = "right"  # of texts that are not packed
    needs_mask: ClassVar[bool] = False  # whether the tokenizer must have a token that hides another

    def __init__(
        self,
        args: CorpusArguments,
        *,
        model: str | None = None,
        splits: Sequence[str] = SPLITS,
        seed: int = 42,
        folder: Path | None = None,
        **loading: object,
    ):
        self.args, self.model, self.seed, self.loading = args, model, seed, loading
        self.notes: list[str] = []
        if "train" in splits:
            self._check_sources()
        if folder is None and not args.corpus_dir:
            self.temporary = tempfile.TemporaryDirectory()  # goes with the task
            folder = Path(self.temporary.name)
        corpus = Path(args.corpus_dir) if args.corpus_dir else folder / "corpus"
        texts = {split: self._texts(split) for split in splits if self._has(split)}
        self.processor = self._tokenizer(texts.get("train"), corpus / "tokenizer")
        stores = {split: build_token_store(part, self.processor, corpus / split) for split, part in texts.items()}
        self.rows = {split: self.rows_of(store, split) for split, store in stores.items()}

    @classmethod
    def incomparable(cls, args: CorpusArguments, metric: str) -> dict[str, str]:
        return {
            **dict.fromkeys(("text_column", "sample_by"), "decides which texts are measured"),
            **dict.fromkeys(
                ("tokenizer", "vocab_size"), f"decides what a token is, and {metric} is a mean over tokens"
            ),
            "context_length": "decides how much text the model has to go by where it is measured",
        }

    def rows_of(self, store: TokenStore, split: str) -> PackedRows:
        """The rows of a split."""
        return PackedRows(store, self.args.context_length)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        """Texts to predict from, as column "text"."""
        check_column(table, self.args.text_column, option="text_column", where=where)
        return Dataset.from_dict({"text": [str(text or "") for text in table[self.args.text_column]]})

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that the model reads."""
        return self.args.context_length

    @property
    def config_fields(self) -> dict[str, object]:
        return {
            "vocab_size": len(self.processor),
            "max_position_embeddings": self.longest_row,
            "bos_token_id": self.processor.bos_token_id,
            "eos_token_id": self.processor.eos_token_id,
            "pad_token_id": self.processor.pad_token_id,
        }

    def configure(self, config, *, labels: Sequence[str] = ()) -> None:
        """Raise ValueError if the model cannot read the rows."""
        limit = getattr(config, "max_position_embeddings", None)
        if self.rows and limit is not None and self.longest_row > limit:
            raise ValueError(
                f"context_length={self.longest_row} exceeds max_position_embeddings={limit}; "
                "lower it, or use a model with a larger limit"
            )
        if len(self.processor) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.processor)} tokens, the model knows vocab_size={config.vocab_size}; "
                "use the model's own tokenizer (tokenizer: <the model's folder>)"
            )

    def batch_rows(self, rows, *, is_training: bool = False) -> PackedRows:
        return super().batch_rows(rows) if isinstance(rows, Dataset) else rows

    def collator(self):
        """Leaves batches of packed rows as they are; pads texts to the longest of them."""

        def collate(rows):
            if isinstance(rows, dict):
                return rows
            texts = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
            return pad_texts(self.processor, texts, padding_side=self.padding_side)

        return collate

    @staticmethod
    def num_items(batch):
        """Predicted tokens of a batch."""
        return (batch["labels"] != -100).sum()

    num_units = num_items

    def units_per_row(self, split: str) -> float:
        return self.args.context_length

    def facts(self) -> dict[str, object]:
        args = self.args
        source = ", ".join(args.train_file or []) or args.dataset or ", ".join(args.test_file or [])
        return {
            "name": args.data_name or Path(source).name,
            "source": source,
            "licence": args.data_licence,
            "tokenizer": f"{self.model or args.tokenizer}, {len(self.processor)} tokens",
            **self.sizes(),
        }

    def sizes(self) -> dict[str, dict[str, int]]:
        stores = {split: rows.store for split, rows in self.rows.items()}
        return {
            split: {"documents": store.num_documents, "tokens": store.num_tokens, "bytes": store.num_bytes}
            for split, store in stores.items()
        }

    def _check_sources(self) -> None:
        if not self.args.dataset and not self.args.train_file:
            raise ValueError("no training text: set dataset (a folder or Hub id), or train_file and validation_file")
        if not self.args.dataset and not self.args.validation_file:
            raise ValueError(
                "validation_file is not set: name a text that is not trained on, or a dataset with a validation split"
            )

    def _has(self, split: str) -> bool:
        files = {"train": self.args.train_file, "validation": self.args.validation_file, "test": self.args.test_file}
        if files[split]:
            return True
        return self.args.dataset is not None and (split != "test" or has_split(self.args.dataset, split))

    def _texts(self, split: str) -> Texts:
        files = {"train": self.args.train_file, "validation": self.args.validation_file, "test": self.args.test_file}
        source = files[split] or self.args.dataset
        return read_texts(source, split=split, text_column=self.args.text_column, sample_by=self.args.sample_by)

    def _tokenizer(self, texts: Texts | None, folder: Path) -> PreTrainedTokenizerBase:
        """The named tokenizer, or one trained on the training text (kept in `folder`, and kept only for this text)."""
        if self.model and Path(self.model).is_dir() and not (Path(self.model) / "config.json").is_file():
            raise ValueError(
                f"model={self.model!r} is a folder without config.json; give one that holds a saved model"
            )
        finished = self.model if self.args.tokenizer in KINDS else self.args.tokenizer
        if finished:
            return self._with_mask(AutoTokenizer.from_pretrained(finished, **self.loading), finished)
        if texts is None:
            raise ValueError(f"tokenizer={self.args.tokenizer} needs a training text; name a finished tokenizer")
        kind = {"kind": self.args.tokenizer, "vocab_size": self.args.vocab_size, "with_mask": self.needs_mask}
        identity = {**kind, "texts": texts.fingerprint}
        stamp = folder / "trained_on.json"
        if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == identity:
            return AutoTokenizer.from_pretrained(folder)
        tokenizer = train_tokenizer(texts, **kind)
        tokenizer.model_max_length = self.longest_row
        tokenizer.save_pretrained(folder)
        stamp.write_text(json.dumps(identity), encoding="utf-8")
        return tokenizer

    def _with_mask(self, tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
        """A finished tokenizer, with a mask token if need be.  Raises: ValueError if a trained model lacks one."""
        if not self.needs_mask or tokenizer.mask_token is not None:
            return tokenizer
        if self.model:
            raise ValueError(
                f"the tokenizer of {name} has no mask token, so that model was not trained to fill one in; start from "
                "a masked language model, or from scratch with tokenizer: <that folder>"
            )
        holds_blanks = any(token.startswith(BLANKS) for token in tokenizer.get_vocab())
        tokenizer.add_special_tokens({"mask_token": mask_token(words_hold_blanks=holds_blanks)})
        self.notes.append(
            f"the tokenizer has no mask token: {tokenizer.mask_token} (id {tokenizer.mask_token_id}) is new"
        )
        return tokenizer
