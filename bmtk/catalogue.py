"""The heads of every family, and the parameters of every preset, as `bmtk models` shows them.

Heads and presets are read from the configuration classes.  A preset's parameters are counted on the meta device, with
the head that the published number was counted with.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from bmtk.models import FAMILIES


@dataclass(frozen=True)
class Published:
    """The published number of parameters of a preset, with which head, and its source; None where none is published.

    Where ours has more or fewer, `source` gives the reason.
    """

    auto_class: str
    parameters: int | None
    source: str


_IMAGES, _TEXT = "AutoModelForImageClassification", "AutoModelForSequenceClassification"
PUBLISHED = {
    "textbook-cnn": Published(
        _IMAGES, 545_098, "by hand: (3*9 + 1)*32 + (32*9 + 1)*64 + (64*8*8 + 1)*128 + (128 + 1)*10"
    ),
    "mlp-784-128-10": Published(_IMAGES, 101_770, "by hand: (784 + 1)*128 + (128 + 1)*10"),
    "mnist-cnn": Published(_IMAGES, 1_199_882, "pytorch/examples, mnist/main.py"),
    "alexnet": Published(_IMAGES, 61_100_840, "torchvision, AlexNet_Weights"),
    "vgg-16": Published(_IMAGES, 138_357_544, "torchvision, VGG16_Weights"),
    "resnet-18": Published(_IMAGES, 11_689_512, "torchvision, ResNet18_Weights"),
    "resnet-50": Published(_IMAGES, 25_557_032, "torchvision, ResNet50_Weights"),
    "convnext-t": Published(_IMAGES, 28_589_128, "torchvision, ConvNeXt_Tiny_Weights"),
    "kim-cnn": Published(_TEXT, 6_360_902, "arXiv:1408.5882: 20000*300 + (3 + 4 + 5)*300*100 + 300 + (300 + 1)*2"),
    "lstm-classifier": Published(
        _TEXT, 2_691_713, "Keras, imdb_lstm; torch's LSTM has a second bias (512), and ours a second label (129)"
    ),
    "awd-lstm-ptb": Published(
        "AutoModelForCausalLM", 24_221_600, "arXiv:1708.02182, by its layers; ours has no output bias"
    ),
    "minigru-small": Published(
        "AutoModelForCausalLM", None, "a shape of our own; arXiv:2410.01201 publishes the cell"
    ),
    "transformer-base-2017": Published(
        "AutoModelForSeq2SeqLM", 63_082_496, "arXiv:1706.03762, by its layers (table 3: 65 M), biases in attention"
    ),
    "bert-base": Published("AutoModel", 109_482_240, "google-bert/bert-base-uncased, with the pooler"),
    "gpt2-small": Published("AutoModelForCausalLM", 124_439_808, "openai-community/gpt2"),
    "vit-s-16": Published(_IMAGES, 22_050_664, "arXiv:2012.12877, DeiT-S"),
    "tinyllama-1.1b": Published("AutoModelForCausalLM", 1_100_048_384, "TinyLlama/TinyLlama-1.1B"),
}


def catalogue() -> dict[str, dict[str, Any]]:
    """Family -> {"heads": Auto class -> class, "presets": name -> parameters, published number and source}."""
    return {
        family.model_type: {
            "heads": {auto_class: reference.split(".")[1] for auto_class, reference in family.heads.items()},
            "presets": {name: _preset(family, name) for name in family.presets},
        }
        for family in FAMILIES
    }


def _preset(family: Any, name: str) -> dict[str, Any]:
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(transformers, published.auto_class).from_config(family.from_preset(name))
    return {
        "parameters": model.num_parameters(),
        "counted_with": published.auto_class,
        "published": published.parameters,
        "source": published.source,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """What `catalogue` returns, as two tables for a terminal."""
    auto_classes = list(dict.fromkeys(name for family in found.values() for name in family["heads"]))
    heads = [["Auto class", *found]]
    for name in auto_classes:
        heads.append([name, *("yes" if name in family["heads"] else "-" for family in found.values())])
    presets = [["preset", "family", "parameters", "counted with", "published"]]
    for family, parts in found.items():
        for name, preset in parts["presets"].items():
            count = f"{preset['parameters']:,}"
            presets.append([name, family, count, preset["counted_with"], _compared(preset)])
    return f"{_aligned(heads)}\n\n{_aligned(presets, right=2)}"


def _compared(preset: dict[str, Any]) -> str:
    """The published number, the difference of ours to it, and its source."""
    known = preset["published"]
    if known is None:
        return preset["source"]
    more = preset["parameters"] - known
    return f"{f'{known:,}, ours {more:+,}' if more else 'the same'}: {preset['source']}"


def _aligned(rows: list[list[str]], right: int | None = None) -> str:
    """Columns as wide as their longest cell; the one at index `right` is right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i == right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
