"""What can be converted: for every model type of transformers, its settings, the fields they become, its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from bmtk.errors import UserError

from .convert_maps import (
    BERT,
    BERT_SETTINGS,
    CLASSIC_SETTINGS,
    CONVNEXT,
    CONVNEXT_SETTINGS,
    GPT2,
    GPT2_SETTINGS,
    LLAMA,
    LLAMA_SETTINGS,
    RESNET,
    RESNET_SETTINGS,
    VIT,
    VIT_SETTINGS,
)


@dataclass(frozen=True)
class Source:
    """How a model type of transformers becomes ours.

    `fields` makes our configuration's fields of theirs; `allowed` are the only values their settings may have.
    `weights` maps patterns of their names, without `prefix`, to ours: to several where one matrix holds several of
    ours, stacked.  Names that match `transposed` hold matrices (inputs, outputs).  `constants` maps patterns of ours
    that they lack to the number which changes nothing.  Where images may have `any_size`, a processor decides it.
    """

    family: str
    prefix: str
    fields: Callable[[PreTrainedConfig], dict[str, Any]]
    weights: Mapping[str, str | tuple[str, ...]]
    heads: dict[str, str]
    allowed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    transposed: str = "(?!)"
    constants: dict[str, float] = field(default_factory=dict)
    any_size: bool = False


def _named(theirs: PreTrainedConfig, names: dict[str, str]) -> dict[str, Any]:
    """Fields whose `names` are ours and theirs."""
    return {ours: getattr(theirs, name) for ours, name in names.items()}


def _side(theirs: PreTrainedConfig, name: str) -> int:
    """A size in pixels that they write as one number or as two.  Raises: UserError if the two differ."""
    size = getattr(theirs, name)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise UserError(f"this {theirs.model_type!r} cannot be converted: {name}={size} is not square")
    return sides.pop()


def _bert_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    dropout = theirs.hidden_dropout_prob if theirs.classifier_dropout is None else theirs.classifier_dropout
    return {
        **CLASSIC_SETTINGS, **_named(theirs, BERT_SETTINGS), "norm_position": "post", "embedding_norm": True,
        "is_causal": False, "classifier_pooling": "first", "classifier_dropout": dropout,
    }  # fmt: skip


def _vit_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    sides = {name: _side(theirs, name) for name in ("image_size", "patch_size")}
    classic = {**CLASSIC_SETTINGS, **_named(theirs, VIT_SETTINGS)}
    return {**classic, **sides, "input_type": "pixels", "classifier_pooling": "first"}


def _gpt2_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    return {**CLASSIC_SETTINGS, **_named(theirs, GPT2_SETTINGS)}


def _llama_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    fields = {name: getattr(theirs, name) for name in LLAMA_SETTINGS}
    has_bias = {"qwen2": True, "mistral": False}.get(theirs.model_type)
    return {
        **fields,
        "norm_eps": theirs.rms_norm_eps,
        "head_dim": getattr(theirs, "head_dim", None),
        "attention_bias": theirs.attention_bias if has_bias is None else has_bias,
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        "qk_norm": theirs.model_type == "qwen3",
    }


def _resnet_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    """Their configuration tells no image size; 224 is what they were all trained with, unless a processor tells."""
    first = 2 if theirs.downsample_in_first_stage else 1
    return {
        **_named(theirs, RESNET_SETTINGS), "image_size": 224, "stem_type": "conv", "norm_type": "batch_norm",
        "strides": [first] + [2] * (len(theirs.hidden_sizes) - 1),
    }  # fmt: skip


def _convnext_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    """All norms have the 1e-6 of the paper's code, which theirs have but for the last one's `layer_norm_eps`."""
    sides = {name: _side(theirs, name) for name in ("image_size", "patch_size")}
    return {
        **_named(theirs, CONVNEXT_SETTINGS), **sides, "block_type": "convnext", "stem_type": "patch",
        "norm_type": "layer_norm", "norm_eps": 1e-6,
    }  # fmt: skip


def _llama(**allowed: tuple[object, ...]) -> Source:
    return Source(
        family="bm_transformer",
        prefix="model.",
        fields=_llama_fields,
        weights=LLAMA,
        heads={"Model": "AutoModel", "ForCausalLM": "AutoModelForCausalLM",
               "ForSequenceClassification": "AutoModelForSequenceClassification"},
        allowed={"hidden_act": ("silu",), "pretraining_tp": (1,), **allowed},
        constants={r"score\.bias|.*\.self_attn\.o_proj\.bias|.*\.mlp\.\w+\.bias": 0.0},
    )  # fmt: skip


SOURCES = {
    "bert": Source(
        family="bm_transformer",
        prefix="bert.",
        fields=_bert_fields,
        weights=BERT,
        heads={"Model": "AutoModel", "ForMaskedLM": "AutoModelForMaskedLM",
               "ForSequenceClassification": "AutoModelForSequenceClassification",
               "ForTokenClassification": "AutoModelForTokenClassification",
               "ForQuestionAnswering": "AutoModelForQuestionAnswering"},
        allowed={"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,), "is_decoder": (False,),
                 "add_cross_attention": (False,)},
    ),
    "convnext": Source(
        family="bm_cnn",
        prefix="convnext.",
        fields=_convnext_fields,
        weights=CONVNEXT,
        heads={"Model": "AutoModel", "ForImageClassification": "AutoModelForImageClassification"},
        # 1e-12 and 1e-6 are one number beside the variance of a pooled map, and the outputs are compared.
        allowed={"hidden_act": ("relu", "gelu", "silu", "tanh"), "layer_norm_eps": (1e-12, 1e-6)},
        constants={r".*\.layer_scale": 1.0},
        any_size=True,
    ),
    "gpt2": Source(
        family="bm_transformer",
        prefix="transformer.",
        fields=_gpt2_fields,
        weights=GPT2,
        heads={"Model": "AutoModel", "LMHeadModel": "AutoModelForCausalLM",
               "ForSequenceClassification": "AutoModelForSequenceClassification"},
        allowed={"activation_function": ("gelu_new", "gelu", "relu"), "scale_attn_weights": (True,),
                 "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        transposed=r"h\.\d+\.(attn|mlp)\.c_\w+\.weight",
        constants={r"score\.bias": 0.0},
    ),
    "llama": _llama(),
    "mistral": _llama(sliding_window=(None,)),
    "qwen2": _llama(use_sliding_window=(False,)),
    "qwen3": _llama(use_sliding_window=(False,)),
    "resnet": Source(
        family="bm_cnn",
        prefix="resnet.",
        fields=_resnet_fields,
        weights=RESNET,
        heads={"Model": "AutoModel", "ForImageClassification": "AutoModelForImageClassification"},
        allowed={"hidden_act": ("relu",)},  # whatever it is, theirs have ReLU inside of blocks
        any_size=True,
    ),
    "vit": Source(
        family="bm_transformer",
        prefix="vit.",
        fields=_vit_fields,
        weights=VIT,
        heads={"Model": "AutoModel", "ForImageClassification": "AutoModelForImageClassification"},
        allowed={"hidden_act": ("gelu", "gelu_new", "relu"), "qkv_bias": (True,), "pooler_act": ("tanh",)},
    ),
}  # fmt: skip
