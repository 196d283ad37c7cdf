"""The table that the model contract runs over: one row per family, per shape and per kind of head.

A new head is a row of HEADS.  A new family is a row of FAMILIES (its initialisation and the turns of its fields) and
rows of SHAPES.  CASES is every shape with every head it names; no test names a family.
"""

import ast
import dataclasses
import inspect
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
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
    "MaskedLM": Head(
        AutoModelForMaskedLM,
        per_position=True,
        labels=token_labels,
        num_items=lambda labels: (labels != -100).sum().item(),
        chance_loss=lambda labels: math.log(VOCAB),
    ),
    "TokenClassification": Head(
        AutoModelForTokenClassification,
        per_position=True,
        labels=lambda ids, mask: token_labels(ids % LABELS, mask),
        num_items=lambda labels: (labels != -100).sum().item(),
        chance_loss=lambda labels: math.log(LABELS),
        config={"num_labels": LABELS},
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

# Heads that read something else than tokens: their fields are turned here, the rest is in COVERED_ELSEWHERE.
TURNED_HEADS = {
    **HEADS,
    "Seq2SeqLM": Head(AutoModelForSeq2SeqLM, per_position=True),
    "ImageClassification": Head(AutoModelForImageClassification, per_position=False),
    "ObjectDetection": Head(AutoModelForObjectDetection, per_position=True),
    "AudioClassification": Head(AutoModelForAudioClassification, per_position=False),
    "TimeSeriesPrediction": Head(AutoModelForTimeSeriesPrediction, per_position=False),
}
# Auto class -> the field and value of a configuration without which it refuses, naming its class; others read tokens
NEEDS = {
    "AutoModel": ("is_encoder_decoder", False),
    "AutoModelForCausalLM": ("is_causal", True),
    "AutoModelForMaskedLM": ("is_causal", False),
    "AutoModelForSeq2SeqLM": ("is_encoder_decoder", True),
    "AutoModelForImageClassification": ("input_type", "pixels"),
    "AutoModelForMaskedImageModeling": ("input_type", "pixels"),
    "AutoModelForObjectDetection": ("input_type", "pixels"),
    "AutoModelForAudioClassification": ("input_type", "audio"),
    "AutoModelForCTC": ("input_type", "audio"),
    "AutoModelForTimeSeriesPrediction": ("input_type", "series"),
}
IMAGE_HEADS = ("AutoModelForImageClassification", "AutoModelForMaskedImageModeling", "AutoModelForObjectDetection")
AUDIO_HEADS = ("AutoModelForAudioClassification", "AutoModelForCTC")
TOKEN_HEADS = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification",
               "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")  # fmt: skip
# (family, heads) -> (the files of tests/models that build them, why they are not rows of the table)
COVERED_ELSEWHERE = {
    ("bm_transformer", ("AutoModelForQuestionAnswering",)): (
        ["head_cases.py", "test_heads.py"], "it has two labels and two logits"
    ),
    ("bm_transformer", ("AutoModelForSeq2SeqLM",)): (["head_cases.py", "test_heads.py"], "it reads two rows"),
    ("bm_transformer", IMAGE_HEADS): (["head_cases.py", "test_heads.py"], "they read images"),
    ("bm_transformer", AUDIO_HEADS): (["head_cases.py", "test_heads.py"], "they read audio"),
    ("bm_transformer", ("AutoModelForTimeSeriesPrediction",)): (
        ["head_cases.py", "test_heads.py"], "it reads series"
    ),
    ("bm_rnn", ("AutoModel", *TOKEN_HEADS)): (["test_bm_rnn.py"], "no attention, a start and a cache of its own"),
    ("bm_rnn", ("AutoModelForSeq2SeqLM",)): (["test_bm_rnn.py"], "it reads two rows"),
    ("bm_rnn", (*AUDIO_HEADS, "AutoModelForTimeSeriesPrediction")): (["test_bm_rnn.py"], "they read audio or series"),
    ("bm_cnn", ("AutoModel", *TOKEN_HEADS)): (
        ["test_bm_cnn_sequences.py", "test_bm_cnn_family.py"], "no attention, a start and a cache of its own"
    ),
    ("bm_cnn", ("AutoBackbone", *IMAGE_HEADS)): (["test_bm_cnn.py", "test_bm_cnn_family.py"], "they read images"),
    ("bm_cnn", (*AUDIO_HEADS, "AutoModelForTimeSeriesPrediction")): (
        ["test_bm_cnn_sequences.py", "test_bm_cnn_family.py"], "they read audio or series"
    ),
}  # fmt: skip

MODERN = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
CLASSIC = {**MODERN, "norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True}
IMAGES = {"input_type": "pixels", "image_size": 16, "patch_size": 4, "position_embedding_type": "learned",
          "fpn_size": 48, "num_detection_layers": 1, "num_feature_levels": 3, "num_labels": LABELS}  # fmt: skip
AUDIO = {"input_type": "audio", "num_mel_bins": 8}
SERIES = {"input_type": "series", "context_length": 12, "prediction_length": 5, "patch_size": 3}
SEQ2SEQ = {"is_encoder_decoder": True, "decoder_start_token_id": 1, "eos_token_id": 2}
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
        ("Model", "MaskedLM", "TokenClassification", "SequenceClassification", "MultiLabelClassification",
         "Regression"),
    ),
    "transformer_rotary_encoder": (BmTransformerConfig, {**MODERN, "is_causal": False}, ("Model", "MaskedLM")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Turn:
    """Another value of a config field, and what must change with it.

    `effect`: "shapes" of the parameters; "weights" (equal shapes, other initial values); "outputs" (equal weights,
    other outputs in eval mode); "training" (equal outputs in eval mode, others in train mode); "loss" (equal outputs,
    another loss); "cache"; "tie"; "generation" (other generated tokens); "serves" (without it, the head refuses).
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
    if name.endswith("norm.weight") or name == "transform.2.weight":
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
            "input_type": Turn("series", "shapes", head="Model", base={"is_causal": False, "image_size": 16}),
            "type_vocab_size": Turn(2, "shapes"),
            "embedding_norm": Turn(True, "shapes"),
            "with_pooler": Turn(True, "shapes", head="SequenceClassification"),
            "is_encoder_decoder": Turn(True, "serves", head="Seq2SeqLM"),
            "decoder_layers": Turn(3, "shapes", head="Seq2SeqLM", base=SEQ2SEQ),
            "decoder_start_token_id": Turn(7, "generation", head="Seq2SeqLM", base=SEQ2SEQ),
            "num_channels": Turn(1, "shapes", head="ImageClassification", base=IMAGES),
            "image_size": Turn(20, "shapes", head="ImageClassification", base=IMAGES),
            "patch_size": Turn(8, "shapes", head="ImageClassification", base=IMAGES),
            "fpn_size": Turn(96, "shapes", head="ObjectDetection", base=IMAGES),
            "num_feature_levels": Turn(2, "shapes", head="ObjectDetection", base=IMAGES),
            "num_detection_layers": Turn(2, "shapes", head="ObjectDetection", base=IMAGES),
            "center_sampling_radius": Turn(0.5, "loss", head="ObjectDetection", base=IMAGES),
            "box_loss": Turn("iou", "loss", head="ObjectDetection", base=IMAGES),
            "focal_alpha": Turn(0.5, "loss", head="ObjectDetection", base=IMAGES),
            "focal_gamma": Turn(1.0, "loss", head="ObjectDetection", base=IMAGES),
            "num_mel_bins": Turn(10, "shapes", head="AudioClassification", base=AUDIO),
            "context_length": Turn(
                15, "shapes", head="TimeSeriesPrediction", base={**SERIES, "position_embedding_type": "learned"}
            ),
            "prediction_length": Turn(6, "shapes", head="TimeSeriesPrediction", base=SERIES),
            "num_input_channels": Turn(2, "shapes", head="TimeSeriesPrediction", base=SERIES),
            "num_time_features": Turn(2, "shapes", head="TimeSeriesPrediction", base=SERIES),
            "series_loss": Turn("mae", "loss", head="TimeSeriesPrediction", base=SERIES),
            "quantiles": Turn(
                [0.2, 0.5], "shapes", head="TimeSeriesPrediction", base={**SERIES, "series_loss": "quantile"}
            ),
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
PIPELINE_CASES = {  # those of other heads run in models/test_heads.py
    name: case for name, case in LOSS_CASES.items() if case.head_name == "CausalLM" or not case.head.per_position
}
POSITION_CASES = {name: case for name, case in CASES.items() if case.head.per_position}


def output_of(outputs) -> torch.Tensor:
    """What a head or a bare trunk returns: logits, prediction, or last_hidden_state."""
    return next(outputs[name] for name in ("logits", "prediction", "last_hidden_state") if name in outputs)


def inputs_of(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """A row of what a configuration reads: tokens 2 to 13, or numbers from N(0, 1)."""
    if config.input_type == "pixels":
        return {"pixel_values": torch.randn(1, config.num_channels, config.image_size, config.image_size)}
    if config.input_type == "audio":
        return {"input_features": torch.randn(1, 40, config.num_mel_bins)}
    if config.input_type == "series":
        return {"past_values": torch.randn(1, config.context_length, config.num_input_channels)}
    ids = {"input_ids": torch.arange(2, 14)[None]}
    return {**ids, "decoder_input_ids": torch.arange(3, 9)[None]} if config.is_encoder_decoder else ids


def answers_of(model: PreTrainedModel) -> dict[str, Any]:
    """What goes with `inputs_of` for a loss: two boxes on an image, or a rising series."""
    if model.config.input_type == "pixels":
        boxes = torch.tensor([[0.5, 0.5, 0.6, 0.6], [0.3, 0.4, 0.4, 0.7]])
        return {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": boxes}]}
    steps = torch.arange(model.config.prediction_length)[None, :, None] - 1.5
    return {"future_values": steps.expand(1, -1, model.config.num_input_channels)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def own_fields(config_class: type) -> dict[str, Any]:
    """Field name -> annotation of what the class itself declares, without what it inherits."""
    annotations = inspect.get_annotations(config_class)
    return {name: kind for name, kind in annotations.items() if typing.get_origin(kind) is not typing.ClassVar}


def turned_fields(config_class: type) -> set[str]:
    """The fields in the turns above, or in the table of the family's own test file."""
    if config_class in FAMILIES:
        return set(FAMILIES[config_class].turns)
    return FIELD_TABLES[config_class]()


def cnn_fields() -> set[str]:
    from models.test_bm_cnn_family import FIELDS

    return set(FIELDS)


def rnn_fields() -> set[str]:
    """test_bm_rnn.py has no table, but sets fields by name: keywords and keys of its calls and dictionaries."""
    tree = ast.parse((Path(__file__).parent / "models" / "test_bm_rnn.py").read_text())
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return (keywords | texts) & own_fields(BmRnnConfig).keys()


FIELD_TABLES = {BmCnnConfig: cnn_fields, BmRnnConfig: rnn_fields}
