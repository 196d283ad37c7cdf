"""Denoising: spans of a text are cut out, an encoder-decoder writes them (T5: Raffel et al. 2020, arXiv:1910.10683).

Loss in nats per token of the target.  Measured rows are corrupted the same way every time, whatever the run's seed.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bmtk.data.packing import IGNORE_INDEX, PackedRows
from bmtk.data.span_corruption import CorruptedSpans, check_noise, noise_mask, num_spans, with_sentinels
from bmtk.errors import UserError
from bmtk.metrics.texts import perplexity
from bmtk.settings import fact, setting

from .corpora import CorpusData, CorpusObjective, CorpusScorer
from .corpus_arguments import CorpusArguments
from .scorer import mean_loss
from .task import Prediction, Task

MEASURED_SEED = 0  # of the spans of validation and test rows
SAMPLE_TOKENS = 24  # of a text that the report shows
SENTINEL = "<extra_id_{}>"  # as T5 writes them


@dataclass
class DenoisingArguments(CorpusArguments):
    """Which text, which tokenizer, how much context, and how much of it is cut out."""

    _argument_group_name = "data of denoising"

    noise_density: float = setting(0.15, "share of a row's tokens that are cut out")
    mean_span_length: float = setting(3.0, "tokens of a span that is cut out, on average")
    prompts: list[str] | None = fact(None, "texts with <extra_id_0>, ... that the report shows filled in")

    free_keys: ClassVar[frozenset[str]] = CorpusArguments.free_keys | {"prompts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_noise(self.noise_density, self.mean_span_length)  # before any length is computed with them

    def settings_that_change(self, metric: str) -> dict[str, str]:
        gaps = dict.fromkeys(("noise_density", "mean_span_length"), "decides which tokens are to be written")
        return {**super().settings_that_change(metric), **gaps}

    def cut_out(self) -> tuple[int, int]:
        """Tokens of a row that are cut out, and in how many spans."""
        return num_spans(self.context_length, self.noise_density, self.mean_span_length)

    @property
    def sentinels(self) -> list[str]:
        """A token for each span of a row."""
        return list(map(SENTINEL.format, range(self.cut_out()[1])))


class DenoisingData(CorpusData):
    """Texts whose tokenizer has a sentinel for each span of a row."""

    @property
    def config_fields(self) -> dict[str, object]:
        start = {"decoder_start_token_id": self.tokenizer.pad_token_id}
        return {**super().config_fields, **start, "is_encoder_decoder": True}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises: UserError if a trained model knows too few sentinels."""
        tokenizer, names = super()._tokenizer(), self.args.sentinels
        missing = [name for name in names if name not in tokenizer.get_vocab()]
        if missing and self.model:
            raise UserError(
                f"the tokenizer of {self.model} has no {missing[0]}: that model was not trained to fill in "
                f"{len(names)} spans; lower context_length or noise_density, or start from scratch"
            )
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": names})
        return tokenizer


class DenoisingObjective(CorpusObjective):
    """Packed text with spans cut out.  Rows without labels are texts with sentinels."""

    def __init__(self, data: DenoisingData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        if not config.is_encoder_decoder:
            raise UserError(
                f"{data.model} reads and writes one row (model_type {config.model_type}, is_encoder_decoder=False); "
                "denoising needs an encoder-decoder"
            )
        ids: Any = self.tokenizer.convert_tokens_to_ids(self.args.sentinels)
        self.sentinels: list[int] = ids

    def of_packed(self, rows: PackedRows, split: str) -> CorruptedSpans:
        return CorruptedSpans(
            rows,
            sentinels=self.sentinels,
            end_token_id=self.tokenizer.eos_token_id,
            noise_density=self.args.noise_density,
            mean_span_length=self.args.mean_span_length,
            seed=self.data.seed if split == "train" else MEASURED_SEED,
        )

    def prepare_to_save(self, model: PreTrainedModel) -> None:
        """Let `generate()` write as many tokens as the targets of training have."""
        model.generation_config.max_new_tokens = sum(self.args.cut_out()) + 1

    def encode(self, rows: Dataset, where: str) -> Dataset:
        """Raises: ValueError for a text without a sentinel."""
        encoded = rows.map(lambda batch: self.tokenizer(batch["text"], verbose=False), batched=True)
        first = SENTINEL.format(0)
        for row, ids in enumerate(encoded["input_ids"], 1):
            if self.tokenizer.convert_tokens_to_ids(first) not in ids:
                raise UserError(f"{where} row {row} has no {first} to be filled in; write one")
        return encoded

    def num_units(self, batch: Mapping[str, Any]) -> int:
        """Tokens that are read and written."""
        return int(batch["attention_mask"].sum() + self.num_items(batch))

    def units_per_row(self, split: str) -> float:
        return self.args.context_length + 2 * self.args.cut_out()[1] + 1

    def next_command(self, directory: Path) -> str:
        """transformers 5 has no pipeline for encoder-decoders."""
        start = "accelerate launch recipes/finetune.py --task translation"
        return f"{start} --model {shlex.quote(str(directory))} --dataset FOLDER"


class DenoisingScorer(CorpusScorer):
    """To predict is to write what stands for each sentinel of a text."""

    objective: DenoisingObjective

    def predict(self, model: Any, batch: Mapping[str, Any]) -> list[Prediction]:
        """Loss and number of the target's tokens of each row; of rows without labels, what stands in the gaps."""
        if "labels" not in batch:
            written = model.generate(**batch)
            return [{"text": self._plain(ids)} for ids in written.tolist()]
        labels, logits = batch["labels"], model(**batch).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1).tolist()
        return [
            {"loss": loss, "items": n}
            for loss, n in zip(losses, (labels != IGNORE_INDEX).sum(-1).tolist(), strict=True)
        ]

    def score(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """Mean loss of the target's tokens, and its perplexity."""
        loss, tokens = mean_loss(predictions), sum(p["items"] for p in predictions)
        return {"loss": loss, "perplexity": perplexity(loss), "tokens": tokens}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": prediction["text"]}

    @torch.no_grad()
    def generated_samples(self, model: torch.nn.Module, *, seed: int) -> list[dict[str, str]]:
        """Texts with gaps, and what the model writes for each."""
        samples = []
        for prompt in self.args.prompts or [self._corrupted_words(seed)]:
            row = self.objective.encode(Dataset.from_dict({"text": [prompt]}), "prompts")[0]
            batch = {name: value.to(model.device) for name, value in self.objective.collator()([row]).items()}
            samples.append({"prompt": prompt, "text": f"\n -> {self.predict(model, batch)[0]['text']}"})
        return samples

    def _plain(self, ids: list[int]) -> str:
        """Text with its sentinels, but without start, end and padding."""
        ends = {
            self.tokenizer.bos_token_id,
            self.tokenizer.eos_token_id,
            self.tokenizer.pad_token_id,
        }
        return str(self.tokenizer.decode([token for token in ids if token not in ends]))

    def _corrupted_words(self, seed: int) -> str:
        """The beginning of a document that is measured on, with spans cut out."""
        store = self.measured_store()
        tokens = np.asarray(store.document(0)[1 : 1 + SAMPLE_TOKENS], np.int64)
        args, draw = self.args, np.random.default_rng(seed)
        is_noise = noise_mask(len(tokens), args.noise_density, args.mean_span_length, draw)
        return str(self.tokenizer.decode(with_sentinels(tokens, is_noise, np.asarray(self.objective.sentinels))))


TASK = Task(
    name="denoising",
    auto_class=AutoModelForSeq2SeqLM,
    about={
        "pipeline_tag": "text2text-generation",
        "auto_class": "AutoModelForSeq2SeqLM",
        "noun": "denoising encoder-decoder",
        "loss_unit": "nats per token",
        "limits": "It writes what it guesses to stand in the gaps of a text, which may be wrong or offensive. It is "
        "meant to be fine-tuned.",
    },
    arguments=DenoisingArguments,
    data=DenoisingData,
    objective=DenoisingObjective,
    scorer=DenoisingScorer,
    main_metric="loss",
    unit="tokens",
    peft_task_type="SEQ_2_SEQ_LM",
)
