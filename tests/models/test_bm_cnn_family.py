"""How layers of bm_cnn start, and how adapters see them; the contract itself is in test_model_contract.py."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
)

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.convolutions_bm import Convolution


def test_convolutions_start_as_kaiming_has_them():
    model = AutoModelForImageClassification.from_config(
        BmCnnConfig(block_type="plain", hidden_sizes=[64, 64], depths=[1, 1], classifier_hidden_sizes=[256])
    )
    conv = model.model.stages[1].blocks[0].conv[0].weight
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert model.classifier[1].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert model.classifier[-1].weight.std().item() == pytest.approx(0.02, rel=0.2)
    layers = AutoModelForCausalLM.from_config(BmCnnConfig(input_type="tokens", num_hidden_layers=4)).model.layers
    assert layers[0].first.taps.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 256)), rel=0.05)
    assert layers[0].second.taps.weight.std().item() == pytest.approx(math.sqrt(2 / (3 * 256)) / 2, rel=0.05)
    depthwise = AutoModelForImageClassification.from_config(
        BmCnnConfig(block_type="convnext", hidden_sizes=[64], depths=[1])
    ).model.stages[0].blocks[0]  # fmt: skip
    assert depthwise.depthwise.weight.std().item() == pytest.approx(math.sqrt(2 / 49), rel=0.05)
    assert (depthwise.layer_scale == torch.tensor(1e-6)).all()


def test_a_convolution_is_a_module_of_its_own_for_adapters():
    """The taps are a linear layer, so that LoRA and quantisation see them."""
    assert isinstance(Convolution(2, 3, kernel_size=2, dilation=1, is_causal=True).taps, nn.Linear)
