"""The table that the model contract runs over: one row per family, per shape and per kind of head.

A new head is a row of HEADS.  A new family is a row of FAMILIES (its initialisation and the turns of its fields) and
rows of SHAPES.  CASES is every shape with every head it names; no test names a family.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_transformer import BmTransformerConfig

VOCAB, LABELS, LENGTH = 67, 3, 12


@dataclasses.dataclass(frozen=True)
class Head:
    """What the contract must know of a kind of head; labels and losses are the task's, not the model's, business."""

    auto_class: type
    per_position: bool  # its output is (B, L, ...), not (B, ...)
    labels: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # (ids, mask) -> labels
    num_items: Callable[[torch.Tensor], int] | None = None  # labels -> predicted elements
    chance_loss: Callable[[torch.Tensor], float] | None = None  # labels -> the loss of a model that knows nothing
    config: dict[str, Any] = dataclasses.field(default_factory=dict)


def token_labels(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(mask == 0, -100)


HEADS = {
    "Model": Head(AutoModel, per_position=True),
    "CausalLM": Head(
        AutoModelForCausalLM,
        per_position=True,
        labels=token_labels,
        num_items=lambda labels: (labels[:, 1:] != -100).sum().item(),
        chance_loss=lambda labels: math.log(VOCAB),
    ),
    "SequenceClassification": Head(
        AutoModelForSequenceClassification,
        per_position=False,
        labels=lambda ids, mask: torch.randint(LABELS, (len(ids),)),
        num_items=len,
        chance_loss=lambda labels: math.log(LABELS),
        config={"num_labels": LABELS},
    ),
    "MultiLabelClassification": Head(
        AutoModelForSequenceClassification,
        per_position=False,
        labels=lambda ids, mask: torch.randint(2, (len(ids), LABELS)).float(),
        num_items=torch.Tensor.numel,
        chance_loss=lambda labels: math.log(2),
        config={"num_labels": LABELS, "problem_type": "multi_label_classification"},
    ),
    "Regression": Head(
        AutoModelForSequenceClassification,
        per_position=False,
        labels=lambda ids, mask: torch.randn(len(ids)),
        num_items=len,
        chance_loss=lambda labels: labels.square().mean().item(),
        config={"num_labels": 1},
    ),
}

MODERN = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
CLASSIC = {**MODERN, "norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True}
DECODER_HEADS = ("Model", "CausalLM", "SequenceClassification")
# name -> (configuration class, its fields, the heads that stand on it)
SHAPES = {
    "transformer_modern": (BmTransformerConfig, {**MODERN, "num_key_value_heads": 2, "qk_norm": True}, DECODER_HEADS),
    "transformer_untied": (
        BmTransformerConfig,
        {**MODERN, "tie_word_embeddings": False, "hidden_act": "relu2", "head_dim": 6, "classifier_pooling": "mean"},
        DECODER_HEADS,
    ),
    "transformer_gpt2": (
        BmTransformerConfig,
        {**CLASSIC, "hidden_act": "gelu_new", "position_embedding_type": "learned"},
        (*DECODER_HEADS, "MultiLabelClassification", "Regression"),
    ),
    "transformer_2017": (
        BmTransformerConfig,
        {**CLASSIC, "hidden_act": "relu", "position_embedding_type": "sinusoidal", "norm_position": "post",
         "scale_embedding": True},
        DECODER_HEADS,
    ),
    "transformer_encoder": (
        BmTransformerConfig,
        {**CLASSIC, "hidden_act": "gelu", "position_embedding_type": "learned", "norm_position": "post",
         "is_causal": False},
        ("Model", "SequenceClassification", "MultiLabelClassification", "Regression"),
    ),
    "transformer_rotary_encoder": (BmTransformerConfig, {**MODERN, "is_causal": False}, ("Model",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Turn:
    """Another value of a config field, and what must change with it.

    `effect`: "shapes" of the parameters; "weights" (equal shapes, other initial values); "outputs" (equal weights,
    other outputs in eval mode); "training" (equal outputs in eval mode, others in train mode); "cache"; "tie";
    "generation" (other generated tokens).
    """

    value: Any
    effect: str
    head: str = "CausalLM"
    base: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
    """A row per configuration class."""

    starting_value: Callable[[str, PreTrainedConfig], tuple[str, float]]  # ("constant" or "std", value) of a parameter
    base: dict[str, Any]  # the configuration whose fields are turned
    turns: dict[str, Turn]


def transformer_starting_value(name: str, config: PreTrainedConfig) -> tuple[str, float]:
    if name.endswith(".bias"):
        return "constant", 0.0
    if name.endswith("norm.weight"):
        return "constant", 1.0
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    scale = math.sqrt(2 * config.num_hidden_layers) if into_residual else 1.0
    return "std", config.initializer_range / scale


FAMILIES = {
    BmTransformerConfig: Family(
        transformer_starting_value,
        base={**MODERN, "hidden_act": "gelu", "initializer_range": 0.5},
        turns={
            "vocab_size": Turn(70, "shapes"),
            "hidden_size": Turn(40, "shapes"),
            "num_hidden_layers": Turn(3, "shapes"),
            "num_attention_heads": Turn(8, "outputs"),
            "num_key_value_heads": Turn(1, "shapes"),
            "head_dim": Turn(16, "shapes"),
            "intermediate_size": Turn(24, "shapes"),
            "hidden_act": Turn("relu", "outputs"),
            "position_embedding_type": Turn("learned", "shapes"),
            "max_position_embeddings": Turn(32, "shapes", base={"position_embedding_type": "learned"}),
            "rope_theta": Turn(100.0, "outputs"),
            "rope_parameters": Turn({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, "outputs"),
            "norm_type": Turn("layer_norm", "shapes"),
            "norm_position": Turn("post", "shapes"),
            "norm_eps": Turn(0.1, "outputs"),
            "qk_norm": Turn(True, "shapes"),
            "attention_bias": Turn(True, "shapes"),
            "mlp_bias": Turn(True, "shapes"),
            "is_causal": Turn(False, "outputs", head="Model"),
            "scale_embedding": Turn(True, "outputs", base={"position_embedding_type": "sinusoidal"}),
            "tie_word_embeddings": Turn(False, "tie"),
            "embedding_dropout": Turn(0.3, "training"),
            "hidden_dropout": Turn(0.3, "training"),
            "attention_dropout": Turn(0.3, "training"),
            "classifier_dropout": Turn(0.3, "training", head="SequenceClassification"),
            "classifier_pooling": Turn("mean", "outputs", head="SequenceClassification"),
            "initializer_range": Turn(0.1, "weights"),
            "use_cache": Turn(False, "cache"),
            "pad_token_id": Turn(5, "generation", base={"eos_token_id": list(range(2, VOCAB, 2))}),
            "bos_token_id": Turn(7, "generation"),
            "eos_token_id": Turn(list(range(2, VOCAB)), "generation"),
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One (shape, head): everything a contract test needs, deterministic in `seed`."""

    shape: str
    head_name: str

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.head_name}"

    @property
    def head(self) -> Head:
        return HEADS[self.head_name]

    def config(self, **changes) -> PreTrainedConfig:
        config_class, fields, _ = SHAPES[self.shape]
        return config_class(**{**fields, **self.head.config, **changes})

    def model(self, *, seed: int = 0, **changes) -> PreTrainedModel:
        torch.manual_seed(seed)
        return self.head.auto_class.from_config(self.config(**changes)).eval()

    def batch(self, *, seed: int = 1) -> dict[str, torch.Tensor]:
        """Rows of 12, 9, 5 and 12 real tokens, padded on the right, with the labels of this head."""
        torch.manual_seed(seed)
        ids = torch.randint(2, VOCAB, (4, LENGTH))
        mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 9, 5, LENGTH])[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask}
        return batch if self.head.labels is None else {**batch, "labels": self.head.labels(ids, mask)}


CASES = {case.name: case for shape, (_, _, heads) in SHAPES.items() for case in (Case(shape, head) for head in heads)}
LOSS_CASES = {name: case for name, case in CASES.items() if case.head.labels is not None}
CAUSAL_CASES = {name: case for name, case in CASES.items() if case.config().is_causal and case.head.per_position}
GENERATING_CASES = {name: case for name, case in CASES.items() if case.head_name == "CausalLM"}
POSITION_CASES = {name: case for name, case in CASES.items() if case.head.per_position}


def output_of(outputs) -> torch.Tensor:
    """What a head or a bare trunk returns: logits, or last_hidden_state."""
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def own_fields(config_class: type) -> dict[str, Any]:
    """Field name -> annotation of what the class itself declares, without what it inherits."""
    annotations = inspect.get_annotations(config_class)
    return {name: kind for name, kind in annotations.items() if typing.get_origin(kind) is not typing.ClassVar}
