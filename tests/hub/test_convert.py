"""`bmtk convert`: ResNet and ConvNeXt become bm_cnn, from folders and from the Hub; whatever cannot be is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    DistilBertConfig,
    ResNetConfig,
    pipeline,
)

import bmtk_cli
from bmtk.hub.convert import convert

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "num_labels": 3}
CONVNEXT = {"hidden_sizes": [16, 24], "depths": [1, 2], "num_stages": 2, "image_size": 32, "num_labels": 3}
BERT = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

# name of the saved model's class, its configuration
CASES = {
    "resnet-basic": ("ResNetForImageClassification", ResNetConfig(layer_type="basic", **RESNET)),
    "resnet-bottleneck": ("ResNetForImageClassification", ResNetConfig(layer_type="bottleneck", **RESNET)),
    "resnet-strided-first": (
        "ResNetForImageClassification",
        ResNetConfig(downsample_in_first_stage=True, downsample_in_bottleneck=True, **RESNET),
    ),
    "resnet-trunk": ("ResNetModel", ResNetConfig(layer_type="basic", **RESNET)),
    "convnext": (
        "ConvNextForImageClassification",
        ConvNextConfig(**CONVNEXT),
    ),  # layer_norm_eps=1e-12 of the last norm
    "convnext-patches": (
        "ConvNextForImageClassification",
        ConvNextConfig(patch_size=[2, 2], hidden_act="silu", **CONVNEXT),
    ),
    "convnext-trunk": ("ConvNextModel", ConvNextConfig(layer_norm_eps=1e-6, **CONVNEXT)),
}


def trained(class_name: str, config) -> nn.Module:
    """A model whose norms, biases, layer scales and running statistics have left the 0 and 1 where they start."""
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif name.endswith("layer_scale_parameter"):
                tensor.copy_(torch.rand_like(tensor) + 0.2)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif isinstance(config, ConvNextConfig):
                tensor.mul_(5)  # which start so small that an output says nothing
    return model.eval()


def bmtk_convert(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()  # what saving the source has printed
    status = bmtk_cli.main(["convert", *map(str, arguments)])
    return status, *capsys.readouterr()


@pytest.fixture(autouse=True)
def loud_again():
    """The command silences transformers for its own process, which here is that of the tests."""
    verbosity = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model in a folder, whose path it returns."""

    def save(class_name: str, config) -> Path:
        trained(class_name, config).save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return save


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_folder_gives_the_same_outputs(name, saved, tmp_path, capsys, record_property):
    class_name, config = CASES[name]
    theirs = trained(class_name, config)
    status, printed, _ = bmtk_convert(capsys, saved(class_name, config), tmp_path / "new" / "ours")
    assert status == 0
    auto_class = "AutoModel" if "trunk" in name else "AutoModelForImageClassification"
    ours = getattr(transformers, auto_class).from_pretrained(tmp_path / "new" / "ours")
    assert f"{class_name} -> {type(ours).__name__}\n" in printed
    assert ours.config.model_type == "bm_cnn"
    pixels = torch.randn(2, 3, 64, 96)
    mine, expected = ours(pixels), theirs(pixels)
    for key in ("logits",) if "logits" in expected else ("last_hidden_state", "pooler_output"):
        right = expected[key]
        right = right.flatten(2).transpose(1, 2) if key == "last_hidden_state" else right.reshape_as(mine[key])
        assert right.std() > 0.05, "the oracle's outputs are too small to say anything"
        difference = (mine[key] - right).abs().max().item()
        record_property(f"largest_difference_{key}", difference)
        assert mine[key].shape == right.shape
        assert difference <= TOLERANCE


def test_buffers_of_batch_norms_come_along(saved, tmp_path):
    theirs = trained(*CASES["resnet-basic"])
    convert(str(saved(*CASES["resnet-basic"])), tmp_path / "ours")
    ours = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    mine, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert len(mine) == len(expected) == 3 * (1 + 2 + 2 + 3)  # of the stem, two blocks, one with a shortcut
    assert torch.equal(
        mine["model.stages.1.blocks.0.shortcut.1.running_var"],
        expected["resnet.encoder.stages.1.layers.0.shortcut.normalization.running_var"],
    )
    assert {int(buffer) for name, buffer in mine.items() if name.endswith("num_batches_tracked")} == {7}


def test_a_pipeline_says_the_same_about_a_picture(saved, tmp_path, capsys):
    config = ResNetConfig(layer_type="basic", id2label={0: "cat", 1: "dog", 2: "fox"}, **RESNET)
    folder = saved("ResNetForImageClassification", config)
    ConvNextImageProcessorPil(
        size={"shortest_edge": 64}, crop_pct=0.8, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1]
    ).save_pretrained(folder)
    _, printed, _ = bmtk_convert(capsys, folder, tmp_path / "ours")
    assert "saved with it       ConvNextImageProcessor" in printed
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    mine, expected = (
        pipeline("image-classification", model=str(where))(picture) for where in (tmp_path / "ours", folder)
    )
    assert {entry["label"] for entry in mine} == {"cat", "dog", "fox"}
    assert [entry["label"] for entry in mine] == [entry["label"] for entry in expected]
    for one, other in zip(mine, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=TOLERANCE)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").image_size == 64


def test_the_command_says_what_it_did_and_what_comes_next(saved, tmp_path, capsys):
    folder, ours = saved(*CASES["resnet-basic"]), tmp_path / "ours"
    status, printed, _ = bmtk_convert(capsys, folder, ours)
    rows = dict(line.split("  ", 1) for line in printed.split("\n\n")[0].splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert status == 0
    assert rows.pop("largest difference").endswith(" of the largest output, for one random input")
    assert rows == {
        "converted": "ResNetForImageClassification -> BmCnnForImageClassification",
        "parameters": f"{trained(*CASES['resnet-basic']).num_parameters():,}",
        "saved with it": "neither tokenizer nor image processor: the source has none",
        "folder": str(ours),
    }
    assert f"AutoModelForImageClassification.from_pretrained('{ours}')" in printed
    assert f"bmtk push {ours} user/name --dry-run" in printed


def test_an_empty_folder_is_filled_and_nothing_else_appears(saved, tmp_path):
    (tmp_path / "ours").mkdir()
    convert(str(saved(*CASES["convnext-trunk"])), tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_checkpoint_without_pooler_gives_a_trunk_without_one(saved, tmp_path):
    """AutoModel would add a random one."""
    folder = saved("BertForMaskedLM", BertConfig(**BERT))
    convert(str(folder), tmp_path / "ours", auto_class="AutoModel")
    ours, ids = AutoModel.from_pretrained(tmp_path / "ours"), torch.randint(31, (2, 9))
    assert not any("pooler" in name for name in ours.state_dict())
    theirs = trained("BertForMaskedLM", BertConfig(**BERT)).bert
    assert (ours(ids).last_hidden_state - theirs(ids).last_hidden_state).abs().max() <= TOLERANCE


REFUSALS = {
    "model type": ("DistilBertModel", DistilBertConfig(dim=16, n_heads=2, n_layers=1, vocab_size=9), [],
                   "is a 'distilbert'; convert knows bert, convnext, gpt2, llama, mistral, qwen2, qwen3, resnet, vit"),
    "setting": ("ConvNextModel", ConvNextConfig(layer_norm_eps=1e-3, hidden_act="mish", **CONVNEXT), [],
                "'convnext' cannot be converted: hidden_act='mish' (only 'relu' or 'gelu' or 'silu' or 'tanh'); "
                "layer_norm_eps=0.001 (only 1e-12 or 1e-06)"),
    "activation": ("ResNetModel", ResNetConfig(hidden_act="gelu", **RESNET), [],
                   "'resnet' cannot be converted: hidden_act='gelu' (only 'relu')"),
    "shape": ("ResNetModel", ResNetConfig(**{**RESNET, "hidden_sizes": [8, 18]}), [],
              "'resnet' cannot be converted: Class validation error for validator 'validate_stages':\n    "
              "ValueError: hidden_sizes=[8, 18] must be multiples of expansion=4"),
    "oblong images": ("ConvNextModel", ConvNextConfig(**{**CONVNEXT, "image_size": [32, 48]}), [],
                      "'convnext' cannot be converted: image_size=[32, 48] is not square"),
    "class": ("BertForNextSentencePrediction", BertConfig(**BERT), [],
              "BertForNextSentencePrediction cannot be converted, but BertModel, "),
    "absent head": ("ResNetModel", ResNetConfig(**RESNET), ["--auto-class", "AutoModelForImageClassification"],
                    "has no weights for the ResNetForImageClassification that auto_class="
                    "'AutoModelForImageClassification' asks for: classifier.1.bias; classifier.1.weight; convert"),
    "Auto class": ("ResNetModel", ResNetConfig(**RESNET), ["--auto-class", "AutoModelForCTC"],
                   "auto_class='AutoModelForCTC' cannot be made of a 'resnet'; choose AutoModel or AutoModelForImage"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_names_its_reason_and_leaves_nothing(name, saved, tmp_path, capsys):
    class_name, config, options, message = REFUSALS[name]
    status, printed, error = bmtk_convert(capsys, saved(class_name, config), tmp_path / "ours", *options)
    assert (status, printed) == (1, "")
    assert error.startswith("bmtk convert: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_backbones_own_norms_have_no_place(saved, tmp_path, capsys):
    folder = saved("ConvNextBackbone", ConvNextConfig(**CONVNEXT))
    status, _, error = bmtk_convert(capsys, folder, tmp_path / "ours")
    assert status == 1
    assert "ConvNextBackbone cannot be converted, but ConvNextModel, ConvNextForImageClassification can" in error


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_there_is_not_touched(what, saved, tmp_path, capsys):
    place = tmp_path / "ours"
    kept = place / "notes.txt" if what == "folder" else place
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    status, _, error = bmtk_convert(capsys, saved(*CASES["convnext-trunk"]), place)
    assert status == 1
    assert error == f"bmtk convert: {place} exists and is not an empty folder; remove it, or choose another\n"
    assert kept.read_text() == "mine"


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    status, _, error = bmtk_convert(capsys, tmp_path / "nothing", tmp_path / "ours")
    assert status == 1
    assert error.startswith(f"bmtk convert: {tmp_path / 'nothing'} is neither a folder here nor a model that the Hub")
    (tmp_path / "empty").mkdir()
    status, _, error = bmtk_convert(capsys, tmp_path / "empty", tmp_path / "ours")
    assert status == 1
    assert "empty has no config.json that names a model_type; pass what save_pretrained wrote" in error
    assert not (tmp_path / "ours").exists()


def test_a_full_disk_leaves_nothing_half_written(saved, tmp_path, capsys, monkeypatch):
    folder = saved(*CASES["convnext-trunk"])
    ConvNextImageProcessorPil().save_pretrained(folder)

    def full(self, directory, **kwargs):
        assert (Path(directory) / "model.safetensors").is_file(), "the weights were written before"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ConvNextImageProcessorPil, "save_pretrained", full)
    status, printed, error = bmtk_convert(capsys, folder, tmp_path / "ours")
    assert (status, printed) == (1, "")
    assert "No space left on device" in error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_outputs_that_are_not_numbers_are_no_conversion(tmp_path):
    """NaN is larger than no bound."""
    model = trained("ConvNextModel", ConvNextConfig(**CONVNEXT))
    with torch.no_grad():
        model.layernorm.bias[0] = float("nan")
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match="its outputs differ by nan of their size"):
        convert(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
def test_a_model_of_the_hub_converts_by_its_name(stand_in_hub, saved, tmp_path):
    folder = saved(*CASES["resnet-basic"])
    ConvNextImageProcessorPil(size={"shortest_edge": 64}).save_pretrained(folder)
    stand_in_hub.add("ann/resnet", {path.name: path.read_bytes() for path in folder.iterdir()})
    environment = stand_in_hub.environment(tmp_path / "home", token=None)

    def run(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "bmtk_cli.py", "convert", name, tmp_path / "ours"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    missing = run("ann/nothing")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.startswith(
        "bmtk convert: ann/nothing is neither a folder here nor a model that the Hub gives"
    )
    done = run("ann/resnet")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ResNetForImageClassification -> BmCnnForImageClassification" in done.stdout
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_bm_cnn.py"} <= {
        path.name for path in (tmp_path / "ours").iterdir()
    }
