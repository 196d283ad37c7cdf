"""Presets of bm_cnn: as many parameters as published, counted without memory on the meta device."""

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import PRESETS, BmCnnConfig

PUBLISHED = {
    "textbook-cnn": 545_098,  # (3*9 + 1)*32 + (32*9 + 1)*64 + (64*8*8 + 1)*128 + (128 + 1)*10
    "mlp-784-128-10": 101_770,  # (784 + 1)*128 + (128 + 1)*10
    "mnist-cnn": 1_199_882,  # pytorch/examples, mnist
    "alexnet": 61_100_840,  # torchvision, AlexNet_Weights
    "vgg-16": 138_357_544,  # torchvision, VGG16_Weights
    "resnet-18": 11_689_512,  # torchvision, ResNet18_Weights
    "resnet-50": 25_557_032,  # torchvision, ResNet50_Weights
    "convnext-t": 28_589_128,  # torchvision, ConvNeXt_Tiny_Weights
    "kim-cnn": 6_360_902,  # 20000*300 + (3 + 4 + 5)*300*100 + 300 + (300 + 1)*2; the paper gives sizes and no count
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name, record_property):
    config = BmCnnConfig.from_preset(name)
    auto = AutoModelForImageClassification if config.input_type == "pixels" else AutoModelForSequenceClassification
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    record_property("parameters", count)
    assert count == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_being_saved(name, tmp_path):
    config = BmCnnConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    assert BmCnnConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", [name for name in PRESETS if "vgg" not in name and "alexnet" not in name])
def test_a_preset_runs_on_the_images_it_names(name):
    config = BmCnnConfig.from_preset(name)
    with torch.device("meta"):
        if config.input_type == "pixels":
            model = AutoModelForImageClassification.from_config(config)
            given = {"pixel_values": torch.empty(2, config.num_channels, config.image_size, config.image_size)}
        else:
            model = AutoModelForSequenceClassification.from_config(config)
            given = {"input_ids": torch.zeros(2, 9, dtype=torch.long)}
        assert model.eval()(**given).logits.shape == (2, config.num_labels)


def test_overrides_change_fields_of_a_preset():
    config = BmCnnConfig.from_preset("resnet-18", num_labels=10, depths=[1, 1, 1, 1], out_features=["stage2"])
    assert (config.num_labels, config.depths, config.hidden_sizes[-1]) == (10, [1, 1, 1, 1], 512)
    assert config.out_features == ["stage2"]
    assert BmCnnConfig.from_preset("resnet-18").num_labels == 1000


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no preset 'resnet18'; there are alexnet, .*resnet-18"):
        BmCnnConfig.from_preset("resnet18")


def test_an_unknown_field_is_refused_with_its_neighbour():
    with pytest.raises(ValueError, match="no field 'hiden_sizes'; did you mean 'hidden_sizes'"):
        BmCnnConfig.from_preset("resnet-18", hiden_sizes=[1])
