"""Depths below the head, told by the names of the weights, and rates that fall with them."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXJapaneseConfig,
    GPTNeoXJapaneseForCausalLM,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.training.adapters import AdapterArguments, add_adapter
from bmtk.training.arguments import LoopArguments
from bmtk.training.layers import depths
from bmtk.training.optimizers import build_optimizer

TEXT = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 3, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2}
BERT = {**TEXT, **HEADS, "intermediate_size": 16, "max_position_embeddings": 8}
BART = {"vocab_size": 19, "d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 8}
BART |= {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")}
T5 = T5Config(vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_decoder_layers=2, num_heads=2)
SPEECH = {**TEXT, **HEADS, "intermediate_size": 16, "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 1}
SPEECH |= {"conv_dim": [4] * 5, "conv_kernel": [2] * 5, "conv_stride": [1] * 5}
TOWER = {**HEADS, "hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4, "vocab_size": 19}
CLIP = {"text_config": TOWER | {"num_hidden_layers": 3}, "vision_config": TOWER | {"num_hidden_layers": 2}}
POOLFORMER = {"depths": [2, 1], "num_encoder_blocks": 2, "hidden_sizes": [4, 4], "patch_sizes": [3, 3]}
POOLFORMER |= {"strides": [2, 2], "padding": [1, 1]}
CONVNEXT = ConvNextConfig(hidden_sizes=[4, 4], depths=[3, 1], num_stages=2)
PIXELS = {
    "input_type": "pixels",
    "block_type": "basic",
    "hidden_sizes": [4, 4, 4],
    "depths": [2, 1, 3],
    "image_size": 8,
}


def classifier(config):
    return AutoModelForSequenceClassification.from_config(config)


# model, and for every parameter the first pattern that its name matches: a depth, or n - group where it has a group
CASES = {
    "bm_transformer": (lambda: classifier(BmTransformerConfig(**TEXT, **HEADS)), {r"layers\.(\d)": 3, r"\.stem\.": 4}),
    "bm_rnn": (lambda: classifier(BmRnnConfig(**TEXT)), {r"layers\.(\d)": 3, r"\.stem\.": 4}),
    "bm_cnn": (
        lambda: AutoModelForImageClassification.from_config(BmCnnConfig(**PIXELS)),
        {r"stages\.(\d)": 3, r"\.stem\.": 4},
    ),
    "bm_transformer, two stacks": (
        lambda: AutoModelForSeq2SeqLM.from_config(BmTransformerConfig(**TEXT, **HEADS, is_encoder_decoder=True)),
        {r"layers\.(\d)": 3, r"\.stem\.": 4},
    ),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**BERT)),
        {r"encoder\.layer\.(\d)": 3, r"embeddings": 4},
    ),
    "gpt_neox_japanese": (  # calls its head embed_out
        lambda: GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(**TEXT, **HEADS, intermediate_multiple_size=1)),
        {r"layers\.(\d)": 3, r"embed_in": 4},
    ),
    "gpt2, tied": (
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=19, n_positions=8)),
        {r"h\.(\d)": 3, r"\.w[tp]e\.": 4},
    ),
    "resnet": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[2, 5], layer_type="basic")
        ),
        {r"stages\.(\d)": 2, r"embedder": 3},
    ),
    "convnext": (
        lambda: ConvNextForImageClassification(CONVNEXT),
        {r"stages\.(\d)": 2, r"embeddings": 3},
    ),
    "poolformer": (
        lambda: PoolFormerForImageClassification(PoolFormerConfig(**POOLFORMER)),
        {r"(?:patch_embeddings|block)\.(\d)": 2},
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(T5),
        {r"encoder\.block\.(\d)": 3, r"decoder\.block\.(\d)": 2, r"shared": 4},
    ),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        {
            r"encoder\.layers\.(\d)": 3,
            r"decoder\.layers\.(\d)": 2,
            r"shared|encoder\..*embed": 4,
            r"decoder\..*embed": 3,
        },
    ),
    "wav2vec2": (
        lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH)),
        {r"encoder\.layers\.(\d)": 3, r"feature|pos_conv|encoder\.layer_norm|masked_spec": 4},
    ),
    "two towers": (
        lambda: VisionTextDualEncoderModel(
            VisionTextDualEncoderConfig.from_vision_text_configs(BmCnnConfig(**PIXELS), BertConfig(**BERT))
        ),
        {r"stages\.(\d)": 3, r"encoder\.layer\.(\d)": 3, r"vision_model\.stem|text_model\.embeddings": 4},
    ),
    "clip": (
        lambda: CLIPModel(CLIPConfig(**CLIP)),
        {r"text.*layers\.(\d)": 3, r"vision.*layers\.(\d)": 2, r"text.*embeddings": 4, r"vision.*(embed|pre_?l)": 3},
    ),
}


def expected(name: str, patterns: dict[str, int]) -> int:
    for pattern, depth in patterns.items():
        if found := re.search(pattern, name):
            return depth - int(found[1]) if found.re.groups and found[1].isdigit() else depth
    return 0


@pytest.mark.parametrize("case", CASES)
def test_depths_are_counted_from_the_head_down(case):
    build, patterns = CASES[case]
    model = build()
    found = depths(model, setting="a test")
    assert {name: found[parameter] for name, parameter in model.named_parameters()} == {
        name: expected(name, patterns) for name, _ in model.named_parameters()
    }
    assert set(found.values()) >= {1, 2}


@pytest.mark.parametrize("case", ["bert", "gpt_neox_japanese"])
def test_the_updates_of_an_adapter_lie_where_its_layers_do(case):
    build, patterns = CASES[case]
    adapted = add_adapter(build(), AdapterArguments(adapter="lora"), task_type=None)
    found = depths(adapted, setting="a test")
    names = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {name: found[parameter] for name, parameter in names.items()} == {
        name: expected(name, patterns) for name in names
    }


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_each_optimizer_has_the_rate_of_the_head_times_the_decay_to_the_depth(kind):
    model = classifier(BmTransformerConfig(**TEXT, **HEADS))
    args = LoopArguments(optimizer=kind, learning_rate=0.1, muon_learning_rate=0.4, layer_lr_decay=0.5)
    optimizer, flat = build_optimizer(model, args), build_optimizer(model, LoopArguments(optimizer=kind))
    peaks = {"muon": 0.4, "adamw": 0.1, "sgd": 0.1}
    found, rates, decays = depths(model, setting="a test"), {}, {}
    for inner in optimizer.optimizers:
        for group in inner.param_groups:
            peak = peaks["muon" if isinstance(inner, torch.optim.Muon) else "adamw"]
            for parameter in group["params"]:
                assert parameter not in rates
                assert group["lr"] == group["initial_lr"] == pytest.approx(peak * 0.5 ** found[parameter])
                rates[parameter], decays[parameter] = group["lr"], group["weight_decay"]
    assert rates.keys() == set(model.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert decays == {p: group["weight_decay"] for group in flat.param_groups for p in group["params"]}


class NoLayers(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.mixer = nn.Linear(4, 4)
        self.post_init()


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"layer_lr_decay=0\.5 needs a list of layers .* and a NoLayers has none"):
        build_optimizer(NoLayers(PreTrainedConfig()), LoopArguments(layer_lr_decay=0.5))
    with pytest.raises(ValueError, match=r"layer_lr_decay=1\.5 is out of range; give a number above 0, and at most 1"):
        LoopArguments(layer_lr_decay=1.5)
