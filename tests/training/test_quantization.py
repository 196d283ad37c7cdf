"""A quantised base under an adapter: what is refused, and that it trains as its dequantised copy does."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    ViTConfig,
)

from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.training import quantization
from bmtk.training.adapters import AdapterArguments, add_adapter, load_adapter
from bmtk.training.starting_weights import load_for_task

TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "num_labels": 3}
IMAGE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
STAGES = {"block_type": "convnext", "hidden_sizes": [32, 64], "depths": [1, 1]}
CONFIGS = {
    "bm_transformer": BmTransformerConfig(**TEXT, num_attention_heads=4),
    "bm_rnn": BmRnnConfig(**TEXT, cell_type="mingru"),
    "bm_cnn": BmCnnConfig(input_type="pixels", image_size=16, **STAGES),
    "bert": BertConfig(**TEXT, num_attention_heads=4, intermediate_size=128),
    "vit": ViTConfig(**IMAGE, intermediate_size=128),
}


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", "0.46.1")


def saved(config, folder):
    """(auto class, folder, batch) of a model of random weights."""
    torch.manual_seed(0)
    batch = {"labels": torch.tensor([0, 1, 1, 0])}
    if hasattr(config, "image_size") and getattr(config, "input_type", "pixels") == "pixels":
        auto, batch["pixel_values"] = AutoModelForImageClassification, torch.randn(4, 3, 16, 16)
    else:
        auto, batch["input_ids"] = AutoModelForSequenceClassification, torch.randint(1, 99, (4, 7))
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)  # zeros would not be missed
    model.save_pretrained(folder)
    return auto, str(folder), batch


def load(auto, folder, kind=None):
    return load_for_task(auto, folder, AutoConfig.from_pretrained(folder), quantize=kind)[0].eval()


def losses(model, batch, *, num_steps=12):
    torch.manual_seed(1)
    adapted = add_adapter(model, AdapterArguments(adapter="lora"), task_type=None).eval()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    told = []
    for _ in range(num_steps):
        loss = adapted(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return adapted, told


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": "lora", "quantize": "3bit"}, "quantize='3bit' is unknown; choose 4bit or 8bit, or leave it out"),
        ({"quantize": "4bit"}, "quantize=4bit leaves weights that cannot be trained: set adapter to lora"),
        (
            {"adapter": "lora", "quantize": "8bit", "merge_adapter": True},
            "merge_adapter would round the update to quantize=8bit",
        ),
    ],
)
def test_what_the_arguments_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**values)


def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    auto, folder, _ = saved(CONFIGS["bert"], tmp_path)
    with pytest.raises(
        ValueError, match=r"quantize=4bit needs bitsandbytes .* extra `quantize`\): pip install -U bits"
    ):
        load(auto, folder, "4bit")


def test_maps_are_not_quantised_to_8_bits(monkeypatch, tmp_path):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: True)
    auto, folder, _ = saved(CONFIGS["bm_cnn"], tmp_path)
    with pytest.raises(ValueError, match=r"quantize=8bit multiplies sequences, and a BmCnnForImage.* choose 4bit"):
        load(auto, folder, "8bit")


@pytest.mark.usefixtures("bitsandbytes")
def test_a_trunk_of_nothing_to_quantise_is_refused(tmp_path):
    auto, folder, _ = saved(BmRnnConfig(**TEXT, cell_type="lstm"), tmp_path)
    with pytest.raises(ValueError, match="the trunk of a BmRnnForSequenceClassification has no linear layers"):
        load(auto, folder, "4bit")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "4bit") for name in CONFIGS), *((name, "8bit") for name in CONFIGS if name != "bm_cnn")],
)
def test_an_adapter_learns_on_a_quantised_base_as_on_its_dequantised_copy(name, kind, tmp_path, bitsandbytes):
    auto, folder, batch = saved(CONFIGS[name], tmp_path / "base")
    model, reference = load(auto, folder, kind), load(auto, folder)
    full = sum(layer.weight.nbytes for _, layer in quantization._linear(reference.base_model))
    packed = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    heads = [module for name, module in model.named_children() if name != model.base_model_prefix]
    assert not any(isinstance(layer, packed) for head in heads for layer in head.modules())
    for layer_name, layer in quantization._linear(model.base_model):
        if "embed" in layer_name:
            continue
        assert isinstance(layer, packed), f"{layer_name} is not quantised"
        if kind == "4bit":
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        else:
            weight = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
        exact = reference.base_model.get_submodule(layer_name).weight
        assert 0 < (weight - exact).norm() < (0.15 if kind == "4bit" else 0.02) * exact.norm()
        exact.data.copy_(weight)
    left = sum(layer.weight.nbytes for _, layer in quantization._linear(model.base_model))
    assert left == full // {"4bit": 8, "8bit": 4}[kind]
    adapted, told = losses(model, batch)
    _, expected = losses(reference, batch)
    assert told[-1] < 0.99 * told[0]
    tolerance = 1e-5 if kind == "4bit" else 0.02  # 8 bits round what the layers read, too
    torch.testing.assert_close(told, expected, rtol=tolerance, atol=tolerance)

    adapted.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load(auto, folder, kind), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, adapted(**batch).logits)
