"""`bmtk models` and the page about models: they say what is registered, and count what is published."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn.modules.module import register_module_parameter_registration_hook

import bmtk_cli
from bmtk.catalogue import PUBLISHED, catalogue, table
from bmtk.hub.convert_sources import SOURCES
from bmtk.models import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
# Why each differs is said in the catalogue, and derived in tests/models/test_bm_rnn.py.
DIFFERENCES = {"lstm-classifier": 641, "awd-lstm-ptb": -10_000}
UNPUBLISHED = {"minigru-small"}


@pytest.fixture(scope="module")
def counted():
    """The catalogue, and where the parameters were that it counted."""
    devices = []

    def note(module, name, parameter):
        devices.append(parameter.device.type)
        assert parameter.is_meta, "presets of a billion parameters would take gigabytes"

    hook = register_module_parameter_registration_hook(note)
    try:
        return catalogue(), devices
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def found(counted):
    return counted[0]


def test_counting_takes_no_memory(counted):
    assert len(counted[1]) > 1000
    assert set(counted[1]) == {"meta"}


def auto_classes() -> dict[str, type]:
    """Every Auto class of transformers that has a mapping from configurations to models."""
    named = {name: getattr(transformers, name) for name in dir(transformers) if name.startswith("Auto")}
    return {name: auto for name, auto in named.items() if hasattr(auto, "_model_mapping")}


def test_the_heads_are_those_that_the_auto_classes_know(found):
    known = auto_classes()
    assert len(known) > 30
    for family in FAMILIES:
        registered = {
            name: auto._model_mapping[family].__name__
            for name, auto in known.items()
            if family in auto._model_mapping._extra_content
        }
        assert found[family.model_type]["heads"] == registered


def test_every_preset_has_its_published_number_of_parameters(found, record_property):
    presets = {name: preset for family in found.values() for name, preset in family["presets"].items()}
    assert sorted(presets) == sorted(name for family in FAMILIES for name in family.presets) == sorted(PUBLISHED)
    for name, preset in presets.items():
        record_property(name, preset["parameters"])
        if name in UNPUBLISHED:
            assert preset["published"] is None
        else:
            assert preset["parameters"] - preset["published"] == DIFFERENCES.get(name, 0), name


def test_a_preset_is_counted_with_the_head_that_is_named(found):
    """By the tensors of a real model, small enough to make."""
    preset = found["bm_cnn"]["presets"]["textbook-cnn"]
    config = next(family for family in FAMILIES if family.model_type == "bm_cnn").from_preset("textbook-cnn")
    model = getattr(transformers, preset["counted_with"]).from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == preset["parameters"]
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.isfinite(model(torch.zeros(1, 3, 32, 32)).logits).all()


def test_the_command_prints_a_row_for_every_auto_class_and_preset(found, capsys):
    assert bmtk_cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert printed == table(found) + "\n"
    lines = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert ["Auto class", "bm_cnn", "bm_rnn", "bm_transformer"] in lines
    assert ["AutoModelForImageClassification", "yes", "-", "yes"] in lines
    assert ["AutoModelForSeq2SeqLM", "-", "yes", "yes"] in lines
    row = ["resnet-18", "bm_cnn", "11,689,512", "AutoModelForImageClassification"]
    assert [*row, "the same: torchvision, ResNet18_Weights"] in lines
    assert any(line[0] == "awd-lstm-ptb" and line[-1].startswith("24,221,600, ours -10,000: ") for line in lines)
    assert len(lines) == 3 + len({name for family in FAMILIES for name in family.heads}) + len(PUBLISHED)


def test_the_command_prints_json_for_programs(found, capsys):
    assert bmtk_cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def rows_of(title: str) -> list[list[str]]:
    """The cells of the table under a heading of the page, without its own heading."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_names_every_combination_that_is_registered_and_no_other():
    rows = rows_of("Combinations")
    heads = [head for _, cell, *_ in rows for head in re.findall(r"`(Auto\w+)`", cell)]
    assert sorted(heads) == sorted({name for family in FAMILIES for name in family.heads})
    for index, family in enumerate(FAMILIES, start=2):
        marked = {cells[1].strip("`") for cells in rows if cells[index] == "yes"}
        assert marked == set(family.heads)
        assert {cells[index] for cells in rows} <= {"yes", "no"}


def test_the_page_says_why_a_combination_is_missing():
    heads = {name for family in FAMILIES for name in family.heads}
    missing = [(name, family.model_type) for family in FAMILIES for name in heads - family.heads.keys()]
    rows = rows_of("What is missing, and why")
    said = [(name, family.strip("`")) for names, family, _ in rows for name in re.findall(r"`(\w+)`", names)]
    assert missing
    assert sorted(said) == sorted(missing)
    assert all(len(why) > 40 for _, _, why in rows)


def test_the_page_lists_every_preset():
    named = {name for _, cell in rows_of("Presets") for name in re.findall(r"`([\w.-]+)`", cell)}
    assert named == set(PUBLISHED)


def test_the_page_and_the_help_name_every_model_type_that_converts():
    rows = [(re.findall(r"`(\w+)`", types), family.strip("`")) for types, family, _ in rows_of("Convert")]
    assert {name: family for names, family in rows for name in names} == {
        name: source.family for name, source in SOURCES.items()
    }
    listed = re.search(r"on the Hub: (.*)\.$", bmtk_cli.CONVERT, re.MULTILINE).group(1)
    assert sorted(re.sub("-", "", name).lower() for name in listed.split(", ")) == sorted(SOURCES)
