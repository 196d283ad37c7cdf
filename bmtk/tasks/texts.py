"""What the tasks that read texts share: a tokenizer, and how much of a text is read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bmtk.data.token_dropout import TokenDropout
from bmtk.data.tokenizers import KINDS, train_tokenizer
from bmtk.settings import setting

from .task import Task

LONGEST = 512  # tokens read of a text where neither tokenizer nor model states a limit


@dataclass
class TextArguments:
    """Which tokenizer, and how many tokens of a text are read."""

    tokenizer: str | None = setting(
        None,
        "folder or Hub id; byte_bpe, char, word or uncased_word: one trained on these texts; default: the model's",
    )
    vocab_size: int = setting(4096, "tokens of a tokenizer to be trained, at most")
    max_length: int | None = setting(None, "tokens read per text, longer ones are cut; default: the model's limit")
    token_dropout: float = setting(
        0.0, "share of a training text's tokens that are hidden behind the unknown token, others in every epoch"
    )

    def check_lengths(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} must be at least 1 token")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"token_dropout={self.token_dropout} is not a share; choose 0 <= token_dropout < 1")


class TextTask(Task):
    """A task whose rows become `input_ids`.  A subclass says in `training_texts` what a tokenizer is trained on."""

    unit = "tokens"

    tokenizer_options: ClassVar[dict[str, bool]] = {}  # of `train_tokenizer`, if one is trained

    def training_texts(self) -> Iterable[str]:
        raise NotImplementedError

    def prepare(self) -> None:
        super().prepare()
        self.processor = self._tokenizer()

    @property
    def config_fields(self) -> dict[str, object]:
        ends = {"bos_token_id": self.processor.bos_token_id, "eos_token_id": self.processor.eos_token_id}
        return {**super().config_fields, "vocab_size": len(self.processor), **ends}

    def configure(self, config, **options) -> None:
        """Raises: ValueError if the model cannot read the tokens."""
        self.fit_tokenizer(config)
        super().configure(config, **options)

    def fit_tokenizer(self, config) -> None:
        """Write the padding token into `config`.  Raises: ValueError if the model cannot read the tokens."""
        if config.pad_token_id is None:  # several models find a text's last token by it
            config.pad_token_id = self.processor.pad_token_id
        if len(self.processor) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.processor)} tokens, the model knows vocab_size={config.vocab_size}; "
                "leave tokenizer out to use the model's own"
            )
        self.longest = self._longest(config)

    def training_rows(self) -> Dataset | TokenDropout:
        rows, tokenizer = super().training_rows(), self.processor
        if not self.args.token_dropout:
            return rows
        hidden = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        kept = frozenset(tokenizer.all_special_ids)
        return TokenDropout(rows, share=self.args.token_dropout, hidden=hidden, kept=kept, seed=self.seed)

    def collator(self) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
        return partial(pad_texts, self.processor)

    def num_units(self, batch) -> int:
        return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()

    def units_per_row(self, split: str) -> float:
        return self._num_tokens(split) / len(self.rows[split])

    def sizes(self) -> dict[str, dict[str, int]]:
        return {split: {"rows": len(rows), "tokens": self._num_tokens(split)} for split, rows in self.rows.items()}

    def _num_tokens(self, split: str) -> int:
        return sum(map(len, self.rows[split]["input_ids"]))

    def keep_rows_with_text(self, rows: Dataset, texts: list[str | None], *, option: str, where: str) -> Dataset:
        """`rows` without those whose text is missing or blank; it is said how many.  Raises: ValueError if all are."""
        kept = [row for row, text in enumerate(texts) if text and not text.isspace()]
        if not kept:
            raise ValueError(f"{option}={getattr(self.args, option)!r} of the {where} data holds no text at all")
        if len(kept) < len(texts):
            self.notes.append(f"{len(texts) - len(kept):,} of {len(texts):,} {where} rows have no text: left out")
        return rows.select(kept)

    def say_what_was_cut(self, lengths: list[int], where: str, longest: int | None = None) -> None:
        longest = longest or self.longest
        cut = sum(length > longest for length in lengths)
        if cut:
            share = f"{cut:,} of {len(lengths):,} {where} texts ({cut / len(lengths):.1%})"
            self.notes.append(f"{share} are longer than {longest} tokens and were cut")

    def _longest(self, config, option: str = "max_length") -> int:
        """Tokens per text: as many as `option` allows, else the tokenizer and the model."""
        stated = [self.processor.model_max_length, getattr(config, "max_position_embeddings", None)]
        limit = min((tokens for tokens in stated if tokens and tokens < 10**9), default=None)  # 10**30 means "none"
        wanted = getattr(self.args, option)
        if limit and wanted and wanted > limit:
            raise ValueError(
                f"{option}={wanted} exceeds the model's limit of {limit} tokens; lower it, or use a "
                "model with a larger one"
            )
        return wanted or limit or LONGEST

    def _tokenizer(self):
        source = self.args.tokenizer or self.model or "byte_bpe"
        if source in KINDS:
            if "train" not in self.rows:
                raise ValueError(f"tokenizer={source} needs training rows to be trained on; name a finished tokenizer")
            size = self.args.vocab_size
            return train_tokenizer(self.training_texts(), kind=source, vocab_size=size, **self.tokenizer_options)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **self.loading)
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


def pad_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping], **options: object
) -> dict[str, torch.Tensor]:
    """Rows of "input_ids" and the like, padded to the longest of them; one position at least, which models need."""
    longest = max(1, *(len(row["input_ids"]) for row in rows))
    return dict(tokenizer.pad(rows, padding="max_length", max_length=longest, return_tensors="pt", **options))


def padded(rows: Sequence[Sequence[int]], value: int, *, width: int = 0) -> torch.Tensor:
    """Rows of whole numbers as one tensor, filled up with `value`."""
    width = max(width, *map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
