"""Causal language modelling: predict the next token of packed text.  Loss in nats per token; also bits per byte."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import set_seed  # transformers' own imports peft, too
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bmtk.data.batches import GlobalBatches
from bmtk.data.packing import IGNORE_INDEX
from bmtk.data.tbptt import TBPTTBatches
from bmtk.errors import UserError
from bmtk.metrics.texts import bits_per_byte, perplexity
from bmtk.settings import fact, setting

from .corpora import CorpusData, CorpusObjective, CorpusScorer
from .corpus_arguments import CorpusArguments
from .objective import python_command
from .scorer import mean_loss
from .task import Prediction, Task


@dataclass
class CausalLMArguments(CorpusArguments):
    """Which text, which tokenizer, how much context, and what the model is asked to go on with."""

    _argument_group_name = "data of causal_lm"

    prompts: list[str] | None = fact(None, "beginnings that the samples of the report go on from")
    sample_tokens: int = setting(200, "tokens per sample; 0: no samples")
    eval_context_length: int | None = setting(
        None, "tokens per row of an evaluation; longer rows give later tokens more to go by; default: context_length"
    )

    carry_state: bool = setting(
        False,
        "read the text in order, and let a recurrent network's state go on from one step to the next (truncated "
        "backpropagation through time)",
    )

    free_keys: ClassVar[frozenset[str]] = CorpusArguments.free_keys | {"prompts", "sample_tokens"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.carry_state and self.packing == "best_fit":
            raise UserError("carry_state reads the text in its order; leave it out, or set packing to cut")
        if self.carry_state and self.is_mixture:
            raise UserError("carry_state reads one text in its order; leave it out, or train on one corpus")
        if self.eval_context_length is not None and self.eval_context_length < 1:
            raise UserError(f"eval_context_length={self.eval_context_length} must be at least 1 token")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        """Bits per byte are the same for all tokenizers; `eval_context_length` makes context_length training's own."""
        found = super().settings_that_change(metric)
        found["eval_context_length"] = found["context_length"]
        if self.eval_context_length:
            del found["context_length"]
        else:
            found["context_length"] += "; set eval_context_length, and it may be"
        if metric == "bits_per_byte":
            del found["tokenizer"], found["vocab_size"]
        return found

    @property
    def longest_row(self) -> int:
        return max(self.context_length, self.eval_context_length or 0)


class CausalLMObjective(CorpusObjective):
    """Packed text.  Rows without labels are prompts."""

    padding_side = "left"  # so that prompts end together

    def __init__(self, data: CorpusData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.keeps_order = self.keeps_order or self.args.carry_state

    def row_length(self, split: str) -> int:
        is_measured = split != "train" and self.args.eval_context_length
        return int(self.args.eval_context_length if is_measured else self.args.context_length)

    def train_batches(self, **sizes: Any) -> GlobalBatches:
        return TBPTTBatches(self.rows["train"], **sizes) if self.args.carry_state else super().train_batches(**sizes)

    def encode(self, rows: Dataset, where: str) -> Dataset:
        return rows.map(lambda batch: self.tokenizer(batch["text"], add_special_tokens=False), batched=True)

    def prepare_to_save(self, model: PreTrainedModel) -> None:
        """Let `generate()` and `pipeline()` sample by default: the likeliest text of a small model repeats itself."""
        model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95)
        model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    def first_words(self, count: int = 8) -> str:
        """The beginning of the text that is measured on: a prompt where the settings have none."""
        store = self.rows["validation" if "validation" in self.rows else "test"].store
        return str(self.tokenizer.decode(store.document(0)[1 : 1 + count]))

    @property
    def most_tokens(self) -> int | None:
        """The positions that the model has, for a prompt and what it writes; None: there is no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def num_new_tokens(self, prompt_length: int, wanted: int) -> int:
        """How many of `wanted` tokens there is room for after a prompt."""
        return wanted if self.most_tokens is None else max(1, min(wanted, self.most_tokens - prompt_length))

    def next_command(self, directory: Path) -> str:
        prompt = (self.args.prompts or [self.first_words()])[0]
        count = self.num_new_tokens(len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"]), wanted=100)
        return python_command(
            "import bmtk; from transformers import pipeline; "
            f"print(pipeline('text-generation', model={str(directory)!r})({prompt!r}, "
            f"max_new_tokens={count})[0]['generated_text'])"
        )


class CausalLMScorer(CorpusScorer):
    """To predict is to write: rows of prompts get their continuations."""

    objective: CausalLMObjective
    metrics = (*CorpusScorer.metrics, "bits_per_byte")

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """Loss and number of predicted tokens of each row; of rows without labels, what the model goes on with."""
        if "shift_labels" not in batch:
            return [{"text": text} for text in self._continuations(model, batch)]
        inputs = {name: value for name, value in batch.items() if name in ("input_ids", "position_ids")}
        if hasattr(model, "token_losses"):  # ours need not hold the logits of all rows
            losses = cast(Any, model).token_losses(batch["shift_labels"], **inputs).sum(-1)
        else:
            logits = model(**inputs, use_cache=False).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), batch["shift_labels"], reduction="none").sum(-1)
        items = (batch["shift_labels"] != IGNORE_INDEX).sum(-1)
        return [{"loss": loss, "items": n} for loss, n in zip(losses.tolist(), items.tolist(), strict=True)]

    def score(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """Mean loss over the whole text, its perplexity and bits per byte."""
        loss, tokens = mean_loss(predictions), sum(p["items"] for p in predictions)
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": bits_per_byte(loss * tokens, rows.store.num_bytes),
            "tokens": tokens,
        }

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": prediction["text"]}

    def generated_samples(self, model: torch.nn.Module, *, seed: int) -> list[dict[str, str]]:
        """What the model writes after each prompt, drawn with the generation settings that are saved with it."""
        if not self.args.sample_tokens:
            return []
        prompts = self.args.prompts or [self.objective.first_words()]
        set_seed(seed)
        return [{"prompt": prompt, "text": self._continue(model, prompt)} for prompt in prompts]

    def _continue(self, model: Any, prompt: str) -> str:
        inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        return self._continuations(model, inputs)[0]

    @torch.no_grad()
    def _continuations(self, model: Any, inputs: Mapping[str, Any]) -> list[str]:
        limit = self.objective.most_tokens
        kept = {name: value[:, 1 - limit if limit else 0 :] for name, value in inputs.items()}
        length = kept["input_ids"].shape[1]
        count = self.objective.num_new_tokens(length, self.args.sample_tokens)
        output = model.generate(**kept, max_new_tokens=count, min_new_tokens=1)
        return self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)


TASK = Task(
    name="causal_lm",
    auto_class=AutoModelForCausalLM,
    about={
        "pipeline_tag": "text-generation",
        "auto_class": "AutoModelForCausalLM",
        "noun": "causal language model",
        "loss_unit": "nats per token",
        "limits": "It continues text in the manner of its training data. What it writes may be false, offensive or "
        "copied from that data; it was not trained to follow instructions or to refuse.",
    },
    arguments=CausalLMArguments,
    data=CorpusData,
    objective=CausalLMObjective,
    scorer=CausalLMScorer,
    main_metric="loss",
    unit="tokens",
    peft_task_type="CAUSAL_LM",
)
