"""What the tasks that read texts share: a tokenizer, and how much of a text is read."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from bmtk.data.number_rows import NumberBatch, NumberLists
from bmtk.data.token_dropout import TokenDropout
from bmtk.data.tokenizers import KINDS, load_tokenizer, train_tokenizer
from bmtk.errors import UserError
from bmtk.settings import setting

from .objective import Objective
from .task import Task
from .task_data import TaskData

LONGEST = 512  # tokens read of a text where neither tokenizer nor model states a limit


@dataclass
class TextArguments:
    """Which tokenizer, and how many tokens of a text are read."""

    tokenizer: str | None = setting(
        None,
        "folder or Hub id; byte_bpe, unigram, wordpiece, bytes, char, word or uncased_word: one trained on these "
        "texts; default: the model's",
    )
    vocab_size: int = setting(4096, "tokens of a tokenizer to be trained, at most")
    max_length: int | None = setting(None, "tokens read per text, longer ones are cut; default: the model's limit")
    token_dropout: float = setting(
        0.0, "share of a training text's tokens that are hidden behind the unknown token, others in every epoch"
    )

    def check_lengths(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length={self.max_length} must be at least 1 token")
        if not 0 <= self.token_dropout < 1:
            raise UserError(f"token_dropout={self.token_dropout} is not a share; choose 0 <= token_dropout < 1")


class TextData(TaskData):
    """Rows of texts, and a tokenizer.  A subclass says in `training_texts` what a tokenizer is trained on."""

    tokenizer_options: ClassVar[dict[str, Any]] = {}  # of `train_tokenizer`, if one is trained

    def __init__(self, task: Task, args: Any, **reading: Any):
        super().__init__(task, args, **reading)
        self.tokenizer = self._tokenizer()

    def training_texts(self) -> Iterable[str]:
        raise NotImplementedError

    @property
    def config_fields(self) -> dict[str, object]:
        ends = {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}
        return {**super().config_fields, "input_type": "tokens", "vocab_size": len(self.tokenizer), **ends}

    def keep_rows_with_text(self, rows: Dataset, texts: Iterable[str | None], *, option: str, where: str) -> Dataset:
        """`rows` without those whose text is missing or blank; a note counts them.  Raises: UserError if all are."""
        kept = [row for row, text in enumerate(texts) if text and not text.isspace()]
        if not kept:
            raise UserError(f"{option}={getattr(self.args, option)!r} of the {where} data holds no text at all")
        if len(kept) == len(rows):
            return rows
        self.notes.append(f"{len(rows) - len(kept):,} of {len(rows):,} {where} rows have no text: left out")
        return rows.select(kept)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        source = self.args.tokenizer or self.model or "byte_bpe"
        if source in KINDS:
            if "train" not in self.rows:
                raise UserError(f"tokenizer={source} needs training rows to be trained on; name a finished tokenizer")
            size = self.args.vocab_size
            return train_tokenizer(self.training_texts(), kind=source, vocab_size=size, **self.tokenizer_options)
        tokenizer = load_tokenizer(source, **self.loading)
        if tokenizer.pad_token is None:
            stand_in = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
            if stand_in is None:
                raise UserError(f"the tokenizer {source} has no padding token, nor another that could stand in for it")
            tokenizer.pad_token = stand_in
            self.notes.append(f"the tokenizer has no padding token: {stand_in!r} stands in for it")
        return tokenizer


class TextObjective(Objective):
    """Rows become `input_ids`."""

    data: TextData

    def __init__(self, data: TextData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.tokenizer, of_texts = data.tokenizer, self.text_config
        if (kind := getattr(of_texts, "input_type", "tokens")) != "tokens":
            raise UserError(f"a {of_texts.model_type} of input_type={kind!r} reads no texts; it needs 'tokens'")
        if of_texts.pad_token_id is None:  # several models find a text's last token by it
            of_texts.pad_token_id = self.tokenizer.pad_token_id
        if len(self.tokenizer) > of_texts.vocab_size:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model knows vocab_size={of_texts.vocab_size}; "
                "leave tokenizer out to use the model's own"
            )
        self.longest = self.longest_of("max_length")

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of what reads the tokens; a part of `config` if texts are not all that a model reads."""
        return self.config

    @property
    def processor(self) -> PreTrainedTokenizerBase:
        return self.tokenizer

    def longest_of(self, option: str) -> int:
        """Tokens per text: as many as `option` allows, else the tokenizer and the model."""
        stated = [self.tokenizer.model_max_length, getattr(self.text_config, "max_position_embeddings", None)]
        # A tokenizer without a limit has model_max_length 10**30.
        limit = min((tokens for tokens in stated if tokens and tokens < 10**9), default=None)
        wanted: int | None = getattr(self.args, option)
        if limit and wanted and wanted > limit:
            raise UserError(
                f"{option}={wanted} exceeds the model's limit of {limit} tokens; lower it, or use a "
                "model with a larger one"
            )
        return wanted or limit or LONGEST

    def training_rows(self) -> Dataset | TokenDropout:
        rows, tokenizer = super().training_rows(), self.tokenizer
        if not self.args.token_dropout:
            return rows
        hidden = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        kept = frozenset(tokenizer.all_special_ids)
        return TokenDropout(rows, share=self.args.token_dropout, hidden=hidden, kept=kept, seed=self.data.seed)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        return partial(pad_texts, self.tokenizer)

    def num_units(self, batch: Mapping[str, Any]) -> int:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def units_per_row(self, split: str) -> float:
        return self._num_tokens(split) / len(self.rows[split])

    def sizes(self) -> dict[str, dict[str, float]]:
        return {split: {"rows": len(rows), "tokens": self._num_tokens(split)} for split, rows in self.rows.items()}

    def _num_tokens(self, split: str) -> int:
        return sum(map(len, self.rows[split]["input_ids"]))

    def note_cut_texts(self, lengths: Sequence[int], where: str, longest: int | None = None) -> None:
        """Note how many texts are longer than the model reads."""
        longest = longest or self.longest
        cut = sum(length > longest for length in lengths)
        if cut:
            share = f"{cut:,} of {len(lengths):,} {where} texts ({cut / len(lengths):.1%})"
            self.notes.append(f"{share} are longer than {longest} tokens and were cut")


def pad_texts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    padding_side: str | None = None,
    return_attention_mask: bool | None = None,
) -> dict[str, torch.Tensor]:
    """Rows of "input_ids" and the like, padded to the longest of them; one position at least, which models need.

    As `tokenizer.pad` gives them, which takes several times as long and is called for tokenizers that have their own.
    """
    if type(tokenizer)._pad is not PreTrainedTokenizerBase._pad:
        pad: Any = tokenizer.pad  # whose annotation knows only some of what it takes
        longest = max(1, *(len(row["input_ids"]) for row in rows))
        options = {"padding_side": padding_side, "return_attention_mask": return_attention_mask}
        return dict(pad(list(rows), padding="max_length", max_length=longest, return_tensors="pt", **options))
    fills = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    fills |= {"special_tokens_mask": 1, "attention_mask": 0}
    columns: dict[str, Any] = dict(rows.columns) if isinstance(rows, NumberBatch) else by_column(rows, lists=fills)
    ids: NumberLists = columns["input_ids"]
    marks = "attention_mask" in tokenizer.model_input_names if return_attention_mask is None else return_attention_mask
    if marks and "attention_mask" not in columns:
        columns["attention_mask"] = NumberLists(np.ones_like(ids.numbers), ids.lengths)
    width, on_left = max(1, int(ids.lengths.max())), (padding_side or tokenizer.padding_side) == "left"
    return {
        name: torch.from_numpy(values.padded(fills[name], width=width, on_left=on_left))
        if name in fills
        else torch.as_tensor(values)
        for name, values in columns.items()
    }


def by_column(rows: Sequence[Mapping[str, Any]], *, lists: Collection[str]) -> dict[str, Any]:
    """The columns of rows; those named in `lists` as NumberLists."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: NumberLists.of(values) if name in lists else values for name, values in columns.items()}


def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of whole numbers as one tensor, filled up with `value`."""
    return torch.from_numpy(NumberLists.of(rows).padded(value))
