"""The model that training starts from: saved weights under the head of an objective, or a new model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from bmtk.errors import UserError

from .adapters import ADAPTER_CONFIG
from .protocols import BindableData, TrainingObjective
from .quantization import quantization, quantize_subclasses


class StartingPoint(Protocol):
    """The settings that name a saved model, or the type of a new one."""

    model: str | None  # folder or Hub id; None: a new model
    model_type: str
    preset_model: str | None  # published shape of a new model

    @property
    def loading(self) -> Mapping[str, Any]:
        """Keyword arguments of `from_pretrained`."""


def starting_config(run: StartingPoint, data: BindableData, chosen: Mapping[str, object]) -> PreTrainedConfig:
    """The configuration of `run.model`, or that of a new `run.model_type` for `data`; before `data.bind`.

    `chosen` are fields of it that the user set; those that a saved model cannot change are noted in `data.notes`.
    """
    if not run.model:
        new: PreTrainedConfig = data.new_config(run.model_type, chosen, preset=run.preset_model)
        return new
    config, notes = read_config(run.model, chosen, **run.loading)
    data.notes += notes
    return config


def starting_weights(
    objective: TrainingObjective, config: PreTrainedConfig, run: StartingPoint, *, quantize: str | None = None
) -> PreTrainedModel:
    """A model of `config` with the head of `objective`: with the weights of `run.model`, or new ones.

    A new model is drawn from torch's global generator.  `quantize` and errors are those of `load_for_task`; weights
    that were not found are noted in `objective.notes`.
    """
    auto_class: Any = objective.auto_class
    if run.model:
        model, notes = load_for_task(auto_class, run.model, config, quantize=quantize, **run.loading)
        objective.notes += notes
    else:
        model = auto_class.from_config(config)
    objective.prepare_to_save(model)
    return model


def load_for_task(
    auto_class: Any, name: str, config: PreTrainedConfig, *, quantize: str | None = None, **loading: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Weights of `name` in float32 under the head of `auto_class`, and notes on those that were not found.

    quantize: "4bit" or "8bit", for the linear layers of the trunk; `loading` are arguments of `from_pretrained`.
    Raises: UserError if the model has no such head, or its trunk is not the one that `config` describes.
    """
    if type(config) not in auto_class._model_mapping and auto_class.__name__ not in getattr(config, "auto_map", {}):
        raise UserError(f"a {config.model_type} model has no head for this task (no {auto_class.__name__} knows it)")
    if quantize:
        with torch.device("meta"):
            skeleton = auto_class.from_config(config, **loading)
        loading["quantization_config"] = quantization(quantize, skeleton)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of missing weights becomes one note
    try:
        model, info = auto_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **loading,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    if quantize:
        quantize_subclasses(model, loading["quantization_config"])
    return model, _weight_notes(model, name, info)


def _weight_notes(model: PreTrainedModel, name: str, info: Mapping[str, Any]) -> list[str]:
    """Notes on the loading `info` of `from_pretrained`.  Raises: UserError if the trunk does not fit."""
    trunk = f"{model.base_model_prefix}."
    wrong = sorted((key, tuple(there), tuple(here)) for key, there, here in info["mismatched_keys"])
    if foreign := [f"{key} {there} there, {here} here" for key, there, here in wrong if key.startswith(trunk)]:
        raise UserError(
            f"the weights of {name} do not have the shapes that the configuration asks for: {'; '.join(foreign[:3])}; "
            "leave the architecture of a pretrained model as it is"
        )
    missing = sorted(info["missing_keys"])
    if len(missing) == len(model.state_dict()):
        raise UserError(f"none of the weights in {name} belongs to a {type(model).__name__}; is it another model?")
    notes, parameters = [], dict(model.named_parameters())
    if learned := [key for key in missing if key in parameters]:
        notes.append(f"NEWLY INITIALISED, to be learned from these data: {', '.join(learned)} (not in {name})")
    if wrong:
        shapes = "; ".join(f"{key} was {there}, is {here}" for key, there, here in wrong)
        notes.append(f"NEWLY INITIALISED, because {name} was trained for another number of labels: {shapes}")
    return notes


def read_config(model: str, chosen: Mapping[str, object], **loading: Any) -> tuple[PreTrainedConfig, list[str]]:
    """The configuration of a saved model with the dropout and head fields of `chosen`, and a note on the other fields.

    Raises: UserError if `model` is not a whole model, or cannot be found.
    """
    folder = Path(model)
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"model={model!r} holds an adapter, not a whole model; save one with merge_adapter, or start from its base"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model={model!r} is a folder without config.json; give one that save_pretrained has filled")
    try:
        config = AutoConfig.from_pretrained(model, **loading)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"model={model!r} is no folder here, and as a Hub id it cannot be loaded: {reason}") from error
    for name in chosen:
        if may_change(name) and hasattr(config, name):
            setattr(config, name, chosen[name])
    others = [name for name in chosen if getattr(config, name, None) != chosen[name]]
    return config, [f"{model} keeps its own architecture: {', '.join(others)} not applied"] if others else []


def may_change(name: str) -> bool:
    """Whether a field of a pretrained model's configuration may be changed: those of dropout and of the head."""
    return "drop" in name or name.startswith("classifier_")
