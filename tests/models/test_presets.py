"""Presets of bm_cnn: saved, overridden, refused, and run without memory on the meta device."""

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.configuration_bm_cnn import PRESETS, BmCnnConfig


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
