"""From pretrained models of transformers to ours, with the same outputs: `bmtk convert MODEL DIR`.

One entry of SOURCES is one model type: which settings it may have, the fields they become, and a map of weight names.
What is not in it is refused by name, and a converted model is compared with its source before it is saved.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .convert_maps import (
    BERT,
    BERT_SETTINGS,
    CLASSIC_SETTINGS,
    GPT2,
    GPT2_SETTINGS,
    LLAMA,
    LLAMA_SETTINGS,
    VIT,
    VIT_SETTINGS,
)

OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")  # that are compared
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}  # of outputs, over their size


@dataclass(frozen=True)
class Source:
    """How a model type of transformers becomes ours.

    `fields` makes our configuration's fields of theirs; `allowed` are the only values their settings may have.
    `weights` maps patterns of their names, without `prefix`, to ours: to several where one matrix holds several of
    ours, stacked.  Names that match `transposed` hold matrices (inputs, outputs).  Ours that match `zeros` they lack.
    """

    family: str
    prefix: str
    fields: Callable[[PreTrainedConfig], dict]
    weights: dict[str, str | tuple[str, ...]]
    heads: dict[str, str]
    allowed: dict[str, tuple] = field(default_factory=dict)
    transposed: str = "(?!)"
    zeros: str = "(?!)"


@dataclass(frozen=True)
class Conversion:
    """What was done: the Auto class that loads `directory`, and the largest difference of outputs, over their size."""

    directory: Path
    auto_class: str
    num_parameters: int
    difference: float


def _classic(theirs: PreTrainedConfig, names: dict[str, str]) -> dict:
    """Fields of a model with LayerNorm and biases; `names` are ours and theirs."""
    return {**CLASSIC_SETTINGS, **{ours: getattr(theirs, name) for ours, name in names.items()}}


def _bert_fields(theirs: PreTrainedConfig) -> dict:
    dropout = theirs.hidden_dropout_prob if theirs.classifier_dropout is None else theirs.classifier_dropout
    return {
        **_classic(theirs, BERT_SETTINGS), "norm_position": "post", "embedding_norm": True, "is_causal": False,
        "classifier_pooling": "first", "classifier_dropout": dropout,
    }  # fmt: skip


def _vit_fields(theirs: PreTrainedConfig) -> dict:
    return {**_classic(theirs, VIT_SETTINGS), "input_type": "pixels", "classifier_pooling": "first"}


def _gpt2_fields(theirs: PreTrainedConfig) -> dict:
    return _classic(theirs, GPT2_SETTINGS)


def _llama_fields(theirs: PreTrainedConfig) -> dict:
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


def _llama(**allowed: tuple) -> Source:
    return Source(
        family="bm_transformer",
        prefix="model.",
        fields=_llama_fields,
        weights=LLAMA,
        heads={"Model": "AutoModel", "ForCausalLM": "AutoModelForCausalLM",
               "ForSequenceClassification": "AutoModelForSequenceClassification"},
        allowed={"hidden_act": ("silu",), "pretraining_tp": (1,), **allowed},
        zeros=r"score\.bias|.*\.self_attn\.o_proj\.bias|.*\.mlp\.\w+\.bias",
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
        zeros=r"score\.bias",
    ),
    "llama": _llama(),
    "mistral": _llama(sliding_window=(None,)),
    "qwen2": _llama(use_sliding_window=(False,)),
    "qwen3": _llama(use_sliding_window=(False,)),
    "vit": Source(
        family="bm_transformer",
        prefix="vit.",
        fields=_vit_fields,
        weights=VIT,
        heads={"Model": "AutoModel", "ForImageClassification": "AutoModelForImageClassification"},
        allowed={"hidden_act": ("gelu", "gelu_new", "relu"), "qkv_bias": (True,), "pooler_act": ("tanh",)},
    ),
}  # fmt: skip


def convert(model: str, directory: str | Path, *, auto_class: str | None = None) -> Conversion:
    """Save the pretrained `model` (a folder or Hub name) as one of ours, with its tokenizer or image processor.

    `auto_class` (such as "AutoModel") keeps only that part of it.  Raises: ValueError naming what cannot be converted.
    """
    theirs_config = AutoConfig.from_pretrained(model)
    source = SOURCES.get(theirs_config.model_type)
    if source is None:
        raise ValueError(f"{model} is a {theirs_config.model_type!r}; convert knows {', '.join(sorted(SOURCES))}")
    auto_class = auto_class or _auto_class(theirs_config, source)
    _check_settings(theirs_config, source)
    theirs = getattr(transformers, auto_class).from_pretrained(model, dtype="auto").eval()
    ours = converted(theirs, auto_class)
    difference = largest_difference(ours, theirs)
    if difference > LARGEST_DIFFERENCE.get(theirs.dtype, 0.0):
        raise ValueError(
            f"{model} was converted, but its outputs differ by {difference:.1e} of their size: it has a setting that "
            "convert does not know; nothing was saved"
        )
    directory = Path(directory)
    ours.save_pretrained(directory)
    _save_processors(model, directory)
    return Conversion(directory, auto_class, ours.num_parameters(), difference)


def converted(theirs: PreTrainedModel, auto_class: str) -> PreTrainedModel:
    """Our model with the weights of `theirs`; every weight of both must find its partner."""
    source = SOURCES[theirs.config.model_type]
    weights, unmapped = _translate(theirs.state_dict(), source)
    if auto_class == "AutoModel":
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    has_pooler = any("pooler." in name for name in weights)
    fields = {**_shared_fields(theirs.config), **source.fields(theirs.config)}
    config = AutoConfig.for_model(source.family, **fields, **({"with_pooler": True} if has_pooler else {}))
    ours = getattr(transformers, auto_class).from_config(config, dtype=theirs.dtype).eval()
    wanted = ours.state_dict()
    for name in wanted.keys() - weights.keys():
        if re.fullmatch(source.zeros, name):
            weights[name] = torch.zeros_like(wanted[name])
    problems = [f"{name} has no place" for name in unmapped + sorted(weights.keys() - wanted.keys())]
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - weights.keys())]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"{type(theirs).__name__} cannot be converted to {type(ours).__name__}: {shown}")
    ours.load_state_dict({name: weights[name].reshape(tensor.shape) for name, tensor in wanted.items()})
    return ours


def _translate(state: dict[str, torch.Tensor], source: Source) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Their weights under our names, and the names that no pattern knows."""
    weights, unmapped = {}, []
    for full_name, tensor in state.items():
        name = full_name.removeprefix(source.prefix)
        found = ((re.fullmatch(pattern, name), ours) for pattern, ours in source.weights.items())
        match, ours = next(((match, ours) for match, ours in found if match), (None, ()))
        if match is None:
            unmapped.append(full_name)
            continue
        names = [match.expand(one) for one in ((ours,) if isinstance(ours, str) else ours)]
        tensor = tensor.T if re.fullmatch(source.transposed, name) else tensor
        weights |= zip(names, tensor.chunk(len(names)), strict=True)
    return weights, unmapped


@torch.no_grad()
def largest_difference(ours: nn.Module, theirs: PreTrainedModel) -> float:
    """Largest difference of the two models' outputs for one random input, over the largest output."""
    generator = torch.Generator().manual_seed(0)
    config = theirs.config
    if theirs.main_input_name == "pixel_values":
        size = config.image_size
        given = {"pixel_values": torch.randn(1, config.num_channels, size, size, generator=generator).to(theirs.dtype)}
    else:
        length = min(16, config.max_position_embeddings)
        given = {"input_ids": torch.randint(config.vocab_size, (1, length), generator=generator)}
    mine, expected = ours(**given), theirs(**given)
    names = [name for name in OUTPUTS if expected.get(name) is not None]
    differences = [(mine[name] - expected[name]).abs().max() / expected[name].abs().max() for name in names]
    return max(difference.item() for difference in differences)


def _auto_class(config: PreTrainedConfig, source: Source) -> str:
    """The Auto class of a checkpoint, by its class's name."""
    family = transformers.MODEL_MAPPING[type(config)].__name__.removesuffix("Model")
    architecture = (config.architectures or ["(no architecture)"])[0]
    known = {family + suffix: auto_class for suffix, auto_class in source.heads.items()}
    if architecture not in known:
        raise ValueError(
            f"{architecture} cannot be converted, but {', '.join(known)} can; to keep a part of it, say which: "
            f"auto_class={' or '.join(known.values())}"
        )
    return known[architecture]


def _check_settings(config: PreTrainedConfig, source: Source) -> None:
    """Raises: ValueError naming every setting that our model does not have."""
    problems = [
        f"{name}={getattr(config, name)!r} (only {' or '.join(map(repr, values))})"
        for name, values in source.allowed.items()
        if hasattr(config, name) and getattr(config, name) not in values
    ]
    if problems:
        raise ValueError(f"this {config.model_type!r} cannot be converted: {'; '.join(problems)}")


def _shared_fields(config: PreTrainedConfig) -> dict:
    """What every configuration calls by the same name."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id")
    fields = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return fields | ({"problem_type": config.problem_type} if config.problem_type else {})


def _save_processors(model: str, directory: Path) -> None:
    for file_name, loader in (
        ("tokenizer_config.json", AutoTokenizer),
        ("preprocessor_config.json", AutoImageProcessor),
    ):
        if cached_file(model, file_name, _raise_exceptions_for_missing_entries=False):
            loader.from_pretrained(model).save_pretrained(directory)
