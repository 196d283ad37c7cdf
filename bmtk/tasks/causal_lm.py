"""Causal language modelling: predict the next token of packed text.  Loss in nats per token; also bits per byte."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from bmtk.data.batches import GlobalBatches, sequential_batches
from bmtk.data.packing import PackedRows
from bmtk.data.sources import Texts, read_texts
from bmtk.data.token_store import build_token_store
from bmtk.data.tokenizers import train_tokenizer

TRAINED_KINDS = ("byte_bpe", "char")


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class CausalLMArguments:
    """Which text, which tokenizer, how much context."""

    _argument_group_name = "data of causal_lm"

    dataset: str | None = _setting(None, "folder or Hub id (owner/name) with a train and a validation split")
    train_file: list[str] | None = _setting(None, "training text: .txt, .jsonl, .csv or .parquet files, or folders")
    validation_file: list[str] | None = _setting(None, "validation text, likewise")
    text_column: str = _setting("text", "column that holds the text (.jsonl, .csv, .parquet, Hub)")
    sample_by: str = _setting("document", "make one document of each .txt file ('document') or of each 'line'")
    data_name: str | None = _setting(None, "what the model card calls the data; default: the source's own name")
    data_licence: str | None = _setting(None, "licence of the data, for the model card")
    tokenizer: str = _setting(
        "byte_bpe", "train a 'byte_bpe' or 'char' tokenizer, or folder or Hub id of a finished one"
    )
    vocab_size: int = _setting(4096, "tokens of a tokenizer to be trained, at most")
    context_length: int = _setting(256, "tokens per row")
    corpus_dir: str | None = _setting(None, "folder for the tokenised text; default: <output_dir>/corpus")
    prompts: list[str] | None = _setting(None, "beginnings that the samples of the report go on from")
    sample_tokens: int = _setting(200, "tokens per sample; 0: no samples")

    def __post_init__(self):
        if not self.dataset and not self.train_file:
            raise ValueError("no training text: set dataset (a folder or Hub id), or train_file and validation_file")
        if self.train_file and not self.validation_file and not self.dataset:
            raise ValueError(
                "validation_file is not set: name a text that is not trained on, or a dataset with a validation split"
            )
        if self.context_length < 1:
            raise ValueError(f"context_length={self.context_length} must be at least 1 token")


class CausalLM:
    """The rows, metrics and samples of one run.  Tokenises into `folder` what is not there yet.

    `model` is the model that training goes on with: its own tokenizer is read, never a new one.
    """

    arguments = CausalLMArguments
    auto_class = AutoModelForCausalLM
    about: ClassVar[dict[str, str]] = {
        "pipeline_tag": "text-generation",
        "auto_class": "AutoModelForCausalLM",
        "noun": "causal language model",
        "limits": "It continues text in the manner of its training data. What it writes may be false, offensive or "
        "copied from that data; it was not trained to follow instructions or to refuse.",
    }
    # Settings that change what is shown, not what is learned: they may differ when a run is resumed.
    free_keys = frozenset(("corpus_dir", "data_name", "data_licence", "prompts", "sample_tokens"))

    def __init__(self, args: CausalLMArguments, folder: Path, *, model: str | None = None):
        self.args = args
        self.model = model
        train = self._texts(args.train_file, "train")
        validation = self._texts(args.validation_file, "validation")
        corpus = Path(args.corpus_dir) if args.corpus_dir else folder / "corpus"
        self.processor = self._tokenizer(train, corpus / "tokenizer")
        self.train_store = build_token_store(train, self.processor, corpus / "train")
        self.validation_store = build_token_store(validation, self.processor, corpus / "validation")
        self.train_rows = PackedRows(self.train_store, args.context_length)
        self.validation_rows = PackedRows(self.validation_store, args.context_length)

    @property
    def config_fields(self) -> dict[str, object]:
        """What a new model's configuration takes from the data."""
        return {
            "vocab_size": len(self.processor),
            "max_position_embeddings": self.args.context_length,
            "bos_token_id": self.processor.bos_token_id,
            "eos_token_id": self.processor.eos_token_id,
            "pad_token_id": self.processor.pad_token_id,
        }

    def check_model(self, config) -> None:
        """Raise ValueError if the model cannot read the rows."""
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and self.args.context_length > limit:
            raise ValueError(
                f"context_length={self.args.context_length} exceeds max_position_embeddings={limit}; "
                "lower it, or use a model with a larger limit"
            )
        if len(self.processor) > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.processor)} tokens, the model knows vocab_size={config.vocab_size}; "
                "use the model's own tokenizer (tokenizer: <the model's folder>)"
            )

    def train_batches(self, **sizes) -> GlobalBatches:
        """The batches of any training step; `sizes` are GlobalBatches' own arguments."""
        return GlobalBatches(self.train_rows, **sizes)

    def validation_batches(self, **sizes) -> Iterator[dict[str, object]]:
        """Every validation row once; `sizes` are sequential_batches' own arguments."""
        return sequential_batches(self.validation_rows, **sizes)

    @property
    def row_length(self) -> int:
        """Tokens per row."""
        return self.args.context_length

    @staticmethod
    def num_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Predicted tokens of a batch."""
        return (batch["labels"] != -100).sum()

    def metrics(self, loss_sum: float, num_items: int) -> dict[str, float]:
        """From the summed loss (nats) over the whole validation text: its mean, perplexity and bits per byte."""
        loss = loss_sum / num_items
        return {
            "validation/loss": loss,
            "validation/perplexity": math.exp(min(loss, 700.0)),
            "validation/bits_per_byte": loss_sum / math.log(2) / self.validation_store.num_bytes,
            "validation/tokens": num_items,
        }

    def samples(self, model, *, seed: int) -> list[dict[str, str]]:
        """What the model writes after each prompt, drawn with the generation settings that are saved with it."""
        if not self.args.sample_tokens:
            return []
        prompts = self.args.prompts or [self._first_words()]
        set_seed(seed)
        return [{"prompt": prompt, "text": self._continue(model, prompt)} for prompt in prompts]

    def prepare_to_save(self, model) -> None:
        """Let `generate()` and `pipeline()` sample by default: the likeliest text of a small model repeats itself."""
        model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95)
        model.generation_config.pad_token_id = self.processor.pad_token_id

    def facts(self) -> dict[str, object]:
        """What the report and the model card say of the data."""
        stores = {"train": self.train_store, "validation": self.validation_store}
        sizes = {
            split: {"documents": store.num_documents, "tokens": store.num_tokens, "bytes": store.num_bytes}
            for split, store in stores.items()
        }
        source = ", ".join(self.args.train_file) if self.args.train_file else self.args.dataset
        return {
            "name": self.args.data_name or Path(source).name,
            "source": source,
            "licence": self.args.data_licence,
            "tokenizer": f"{self.model or self.args.tokenizer}, {len(self.processor)} tokens",
            **sizes,
        }

    def next_command(self, directory: Path) -> str:
        """What to type to see the result."""
        prompt = json.dumps((self.args.prompts or [self._first_words()])[0])
        return (
            f'python -c "import bmtk; from transformers import pipeline; '
            f"print(pipeline('text-generation', model='{directory}')({prompt.replace(chr(34), chr(39))}, "
            f"max_new_tokens=100)[0]['generated_text'])\""
        )

    def _texts(self, files: list[str] | None, split: str) -> Texts:
        source = files or self.args.dataset
        return read_texts(source, split=split, text_column=self.args.text_column, sample_by=self.args.sample_by)

    def _tokenizer(self, texts: Texts, folder: Path) -> PreTrainedTokenizerBase:
        """The named tokenizer, or one trained on the training text (kept in `folder`, and kept only for this text)."""
        if self.model and Path(self.model).is_dir() and not (Path(self.model) / "config.json").is_file():
            raise ValueError(
                f"model={self.model!r} is a folder without config.json; give one that holds a saved model"
            )
        finished = self.model if self.args.tokenizer in TRAINED_KINDS else self.args.tokenizer
        if finished:
            return AutoTokenizer.from_pretrained(finished)
        identity = {"kind": self.args.tokenizer, "vocab_size": self.args.vocab_size, "texts": texts.fingerprint}
        stamp = folder / "trained_on.json"
        if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == identity:
            return AutoTokenizer.from_pretrained(folder)
        tokenizer = train_tokenizer(texts, kind=self.args.tokenizer, vocab_size=self.args.vocab_size)
        tokenizer.model_max_length = self.args.context_length
        tokenizer.save_pretrained(folder)
        stamp.write_text(json.dumps(identity), encoding="utf-8")
        return tokenizer

    def _first_words(self, count: int = 8) -> str:
        return self.processor.decode(self.validation_store.document(0)[1 : 1 + count])

    @torch.no_grad()
    def _continue(self, model, prompt: str) -> str:
        inputs = self.processor(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        output = model.generate(**inputs, max_new_tokens=self.args.sample_tokens, min_new_tokens=1)
        return self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
