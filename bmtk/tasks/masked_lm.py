"""Masked language modelling: guess hidden tokens from both sides (BERT: Devlin et al. 2018, arXiv:1810.04805).

Loss in nats per hidden token.  In measurements the hidden tokens are the same every time, whatever the run's seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from bmtk.data.masking import MaskedTokens
from bmtk.data.packing import IGNORE_INDEX, PackedRows
from bmtk.errors import UserError
from bmtk.metrics.texts import perplexity
from bmtk.settings import fact, setting

from .corpora import CorpusData, CorpusObjective, CorpusScorer
from .corpus_arguments import CorpusArguments
from .scorer import mean_loss
from .task import Prediction, Task

MEASURED_SEED = 0  # of the masks of validation and test rows
TOP = 5  # guesses shown for each mask
SAMPLES, SAMPLE_TOKENS, SAMPLE_MASKS = 4, 24, 3  # sentences that the report shows where no prompts are given


@dataclass
class MaskedLMArguments(CorpusArguments):
    """Which text, which tokenizer, how much context, and how much of it is hidden."""

    _argument_group_name = "data of masked_lm"

    mlm_probability: float = setting(0.15, "share of a row's tokens that are hidden and to be guessed")
    whole_word_masking: bool = setting(False, "hide all tokens of a word or none")
    prompts: list[str] | None = fact(None, "texts with <mask> that the report shows filled in")

    free_keys: ClassVar[frozenset[str]] = CorpusArguments.free_keys | {"prompts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise UserError(f"mlm_probability={self.mlm_probability} is not a share; choose between 0 and 1")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        hidden = dict.fromkeys(("mlm_probability", "whole_word_masking"), "decides which tokens are to be guessed")
        return {**super().settings_that_change(metric), **hidden}


class MaskedLMData(CorpusData):
    """Texts whose tokenizer has a mask token."""

    needs_mask = True

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "is_causal": False}


class MaskedLMObjective(CorpusObjective):
    """Packed text with hidden tokens.  Rows without labels are texts with mask tokens."""

    def __init__(self, data: MaskedLMData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.longest: int = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        if data.rows and not config.model_type.startswith("bm_"):
            self.notes.append(
                f"documents that share a row see each other: a {config.model_type} cannot keep them apart"
            )

    def of_packed(self, rows: PackedRows, split: str) -> MaskedTokens:
        return MaskedTokens(
            rows,
            self.tokenizer,
            probability=self.args.mlm_probability,
            whole_words=self.args.whole_word_masking,
            seed=self.data.seed if split == "train" else MEASURED_SEED,
        )

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """Raises: ValueError for a text without a mask, or longer than the model reads."""
        encoded = rows.map(lambda batch: self.tokenizer(batch["text"], verbose=False), batched=True)
        for row, ids in enumerate(encoded["input_ids"], 1):
            if self.tokenizer.mask_token_id not in ids:
                raise UserError(f"{where} row {row} has no {self.tokenizer.mask_token} to be filled in; write one")
            if len(ids) > self.longest:
                raise UserError(
                    f"{where} row {row} has {len(ids)} tokens, this model reads {self.longest}; shorten it"
                )
        return encoded

    def num_units(self, batch: Mapping[str, Any]) -> int:
        """Tokens that are read, hidden or not."""
        return batch["input_ids"].numel()

    def example_input(self) -> str:
        return f"'This is {self.tokenizer.mask_token}.'"


class MaskedLMScorer(CorpusScorer):
    """To predict is to fill in: texts with mask tokens get them replaced."""

    metrics = (*CorpusScorer.metrics, "masked_accuracy")

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """Loss, hidden tokens and right guesses of each row; of rows without labels, the filled-in text."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        if "labels" not in batch:
            return [
                self._filled(ids, scores) for ids, scores in zip(batch["input_ids"], logits.softmax(-1), strict=True)
            ]
        labels = batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1).tolist()
        items, hits = (labels != IGNORE_INDEX).sum(-1).tolist(), (logits.argmax(-1) == labels).sum(-1).tolist()
        return [{"loss": loss, "items": n, "hits": right} for loss, n, right in zip(losses, items, hits, strict=True)]

    def score(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """Mean loss of the hidden tokens, its perplexity, and the share that is guessed right."""
        loss, tokens = mean_loss(predictions), sum(p["items"] for p in predictions)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "masked_accuracy": sum(p["hits"] for p in predictions) / max(1, tokens),
            "tokens": tokens,
        }

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": prediction["text"], "guesses": prediction["guesses"]}

    @torch.no_grad()
    def generated_samples(self, model: torch.nn.Module, *, seed: int) -> list[dict[str, str]]:
        """Texts with masks, and the likeliest tokens for each mask."""
        prompts = self.args.prompts or self._hidden_words(seed)
        rows = self.objective.encode(Dataset.from_dict({"text": prompts}), "prompts")
        samples = []
        for prompt, row in zip(prompts, rows, strict=True):
            batch = {name: value.to(model.device) for name, value in self.objective.collator()([row]).items()}
            samples.append({"prompt": prompt, "text": f" -> {self.predict(model, batch)[0]['guesses']}"})
        return samples

    def _filled(self, ids: torch.Tensor, scores: torch.Tensor) -> Prediction:
        """The text of ids (L,) with its masks replaced by the likeliest tokens of scores (L, V)."""
        places = (ids == self.tokenizer.mask_token_id).nonzero()[:, 0]
        best, filled = scores[places].topk(TOP), ids.clone()
        filled[places] = best.indices[:, 0]
        guesses = [
            self._guesses(tokens, values)
            for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return {
            "text": self.tokenizer.decode(filled, skip_special_tokens=True),
            "guesses": " | ".join(guesses),
        }

    def _guesses(self, tokens: Sequence[int], scores: Sequence[float]) -> str:
        texts = (str(self.tokenizer.decode([token])) for token in tokens)
        named = (text.strip() or repr(text) for text in texts)
        return ", ".join(f"{name} {score:.2f}" for name, score in zip(named, scores, strict=True))

    def _hidden_words(self, seed: int) -> list[str]:
        """Beginnings of documents of the text that is measured on, with a few tokens hidden."""
        draw, texts = np.random.default_rng(seed), []
        rows = self.objective.rows["validation" if "validation" in self.objective.rows else "test"]
        for document in np.linspace(0, rows.store.num_documents - 1, SAMPLES).astype(int):
            ids = np.array(rows.store.document(document)[:SAMPLE_TOKENS], np.int64)
            ids = ids[~rows.is_special[ids]]
            if len(ids):
                ids[draw.choice(len(ids), min(SAMPLE_MASKS, len(ids)), replace=False)] = rows.mask_token_id
                texts.append(self._spaced(str(self.tokenizer.decode(ids))))
        return texts

    def _spaced(self, text: str) -> str:
        """Blanks before masks, where a mask token takes the blank before it: the tokens stay the same."""
        mask = self.tokenizer.mask_token
        takes_blanks = self.tokenizer.added_tokens_decoder[self.tokenizer.mask_token_id].lstrip
        return text.replace(mask, f" {mask}") if takes_blanks else text


TASK = Task(
    name="masked_lm",
    auto_class=AutoModelForMaskedLM,
    about={
        "pipeline_tag": "fill-mask",
        "auto_class": "AutoModelForMaskedLM",
        "noun": "masked language model",
        "loss_unit": "nats per token",
        "limits": "It guesses single hidden tokens in the manner of its training data, which may be wrong or "
        "offensive; it does not write texts. It is meant to be fine-tuned.",
    },
    arguments=MaskedLMArguments,
    data=MaskedLMData,
    objective=MaskedLMObjective,
    scorer=MaskedLMScorer,
    main_metric="loss",
    unit="tokens",
)
