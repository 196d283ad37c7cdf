"""What every parameter of a new model starts from, by name and kind of layer; bmtk's code is not asked.

Sources: Radford et al. 2019 (projections into a residual stream), He et al. 2015 (convolutions), Glorot & Bengio 2010
and Saxe et al. 2013 (recurrences), Jozefowicz et al. 2015 (forget gates), Lin et al. 2017 (a detector's prior).
"""

import math

import torch
from torch import nn


def starting_value(model: nn.Module, name: str) -> tuple[str, torch.Tensor | float]:
    """("constant", value) or ("std", standard deviation around 0) of the parameter `name`."""
    owner, _, leaf = name.rpartition(".")
    module, parameter = model.get_submodule(owner), model.get_parameter(name)
    if isinstance(module, nn.RNNBase):
        return recurrent(module, leaf, parameter)
    if "recurrence.in_proj" in name:
        return mingru(leaf, parameter, directions=1 if model.config.is_causal or "decoder" in name else 2)
    if "towers." in name and isinstance(module, nn.Conv2d):
        prior = -math.log(0.99 / 0.01) if "class_logits" in name else 0.0
        return ("std", 0.01) if leaf == "weight" else ("constant", prior)
    if leaf == "mask_token":
        return "std", model.config.initializer_range
    if leaf == "layer_scale":
        return "constant", model.config.layer_scale_init_value
    if parameter.ndim == 1:
        return "constant", 0.0 if leaf == "bias" else 1.0
    return "std", SPREADS[model.config.model_type](name, module, model.config)


def recurrent(module: nn.RNNBase, leaf: str, parameter: torch.Tensor) -> tuple[str, torch.Tensor | float]:
    if leaf.startswith("weight_ih"):
        return "std", math.sqrt(2 / (module.input_size + module.hidden_size))
    if leaf.startswith("weight_hh"):
        return "std", module.hidden_size**-0.5  # orthogonal: rows of length 1
    start = torch.zeros_like(parameter)
    if module.mode == "LSTM" and leaf.startswith("bias_ih"):
        start.view(4, -1)[1] = 1.0
    return "constant", start


def mingru(leaf: str, parameter: torch.Tensor, *, directions: int) -> tuple[str, torch.Tensor | float]:
    if leaf == "weight":
        return "std", math.sqrt(2 / sum(parameter.shape))
    start = torch.zeros_like(parameter)
    start.view(directions, 2, -1)[:, 1] = -1.0
    return "constant", start


def transformer_spread(name: str, module: nn.Module, config) -> float:
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if into_residual else 1)


def cnn_spread(name: str, module: nn.Module, config) -> float:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return math.sqrt(2 / module.weight[0].numel())
    *_, parent, kind, _ = ("", "", *name.split("."))
    depth = math.sqrt(config.num_hidden_layers)
    if kind == "taps":
        size = config.hidden_size
        outputs = {"filter_and_gate": 2 * size, "first": size, "second": size}
        width = outputs.get(parent, size // len(config.filter_widths))
        taps = module.out_features // width
        return math.sqrt(2 / (taps * module.in_features)) / (depth if parent == "second" else 1)
    if kind in ("skip", "residual"):
        return module.in_features**-0.5 / depth
    is_hidden_classifier = parent == "classifier" and module.out_features in config.classifier_hidden_sizes
    if name.endswith("closing.linear.weight") or is_hidden_classifier:
        return math.sqrt(2 / module.in_features)
    return config.initializer_range


SPREADS = {
    "bm_transformer": transformer_spread,
    "bm_rnn": lambda name, module, config: config.initializer_range,
    "bm_cnn": cnn_spread,
}
