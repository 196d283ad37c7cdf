"""Convert pretrained models of transformers to ours, with the same outputs: `bmtk convert MODEL DIR`.

What is not in SOURCES is refused by name, and a converted model is compared with its source before it is saved.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from bmtk.errors import UserError
from bmtk.files import replacing_folder

from .convert_sources import SOURCES, Source

OUTPUTS = ("last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")  # that are compared
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}  # of outputs, over their size


@dataclass(frozen=True)
class Conversion:
    """The result: classes, the Auto class that loads `directory`, the processors saved beside the model.

    `difference` is the largest of the outputs, over the largest output.
    """

    directory: Path
    source_class: str
    model_class: str
    auto_class: str
    num_parameters: int
    difference: float
    processors: tuple[str, ...]


def convert(model: str, directory: str | Path, *, auto_class: str | None = None) -> Conversion:
    """Save the pretrained `model` (a folder or Hub name) as one of ours, with its tokenizer or image processor.

    `auto_class` (such as "AutoModel") keeps only that part of it.  Raises: UserError naming what cannot be converted,
    or a `directory` that holds something; OSError for a model without weights.  Then nothing was saved.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not an empty folder; remove it, or choose another")
    source = _source(model)
    theirs_config = AutoConfig.from_pretrained(model)
    auto_class = _auto_class(theirs_config, source, auto_class)
    _check_settings(theirs_config, source)
    theirs, processors = _load(model, auto_class), _processors(model)
    ours = converted(theirs, auto_class)
    if source.any_size:
        ours.config.image_size = _image_size(processors) or ours.config.image_size
    difference = largest_difference(ours, theirs)
    if not difference <= LARGEST_DIFFERENCE.get(theirs.dtype, 0.0):
        raise UserError(
            f"{model} was converted, but its outputs differ by {difference:.1e} of their size: it has a setting that "
            "convert does not know; nothing was saved"
        )
    with replacing_folder(directory) as beside:
        for part in (ours, *processors):
            part.save_pretrained(beside)
    return Conversion(
        directory, type(theirs).__name__, type(ours).__name__, auto_class, ours.num_parameters(), difference,
        tuple(type(processor).__name__ for processor in processors),
    )  # fmt: skip


def converted(theirs: PreTrainedModel, auto_class: str) -> PreTrainedModel:
    """Our model with the weights of `theirs`; every weight of either must have its counterpart."""
    source = SOURCES[theirs.config.model_type]
    weights, unmapped = translate(theirs.state_dict(), source)
    if auto_class == "AutoModel":
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    has_pooler = any("pooler." in name for name in weights)
    ours = _build(theirs, auto_class, source, {"with_pooler": True} if has_pooler else {})
    wanted = ours.state_dict()
    for name in wanted.keys() - weights.keys():
        for pattern, value in source.constants.items():
            if re.fullmatch(pattern, name):
                weights[name] = torch.full_like(wanted[name], value)
    problems = [f"{name} has no place" for name in unmapped + sorted(weights.keys() - wanted.keys())]
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - weights.keys())]
    if problems:
        raise UserError(
            f"{type(theirs).__name__} cannot be converted to {type(ours).__name__}: {_shortened(problems)}"
        )
    ours.load_state_dict({name: weights[name].reshape(tensor.shape) for name, tensor in wanted.items()})
    return ours


def _build(theirs: PreTrainedModel, auto_class: str, source: Source, more: dict[str, Any]) -> PreTrainedModel:
    """Our model of their shape.  Raises: UserError where our configuration refuses a value of theirs."""
    fields = {**_shared_fields(theirs.config), **source.fields(theirs.config), **more}
    try:
        config = AutoConfig.for_model(source.family, **fields)
    except StrictDataclassError as error:
        raise UserError(f"this {theirs.config.model_type!r} cannot be converted: {error}") from error
    return getattr(transformers, auto_class).from_config(config, dtype=theirs.dtype).eval()


def translate(state: dict[str, torch.Tensor], source: Source) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Their weights under our names, and the names that no pattern knows."""
    weights: dict[str, torch.Tensor] = {}
    unmapped = []
    for full_name, tensor in state.items():
        name = full_name.removeprefix(source.prefix)
        found = ((re.fullmatch(pattern, name), ours) for pattern, ours in source.weights.items())
        match, ours = next(((match, ours) for match, ours in found if match), (None, ()))
        if match is None:
            unmapped.append(full_name)
            continue
        names = [match.expand(one) for one in ((ours,) if isinstance(ours, str) else ours)]
        tensor = tensor.T if re.fullmatch(source.transposed, name) else tensor
        weights |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True)
    return weights, unmapped


@torch.no_grad()
def largest_difference(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """Largest difference of the two models' outputs for one random input, over the largest output."""
    generator = torch.Generator().manual_seed(0)
    config = ours.config
    if theirs.main_input_name == "pixel_values":
        shape = (1, config.num_channels, config.image_size, config.image_size)
        given = {"pixel_values": torch.randn(shape, generator=generator).to(theirs.dtype)}
    else:
        length = min(16, config.max_position_embeddings)
        given = {"input_ids": torch.randint(config.vocab_size, (1, length), generator=generator)}
    mine, expected = ours(**given), theirs(**given)
    names = [name for name in OUTPUTS if expected.get(name) is not None]
    differences = []
    for name in names:
        right = as_positions(expected[name]).reshape_as(mine[name])
        differences.append((mine[name] - right).abs().max() / right.abs().max())
    return torch.stack(differences).max().item()  # which is NaN if one of them is


def as_positions(output: torch.Tensor) -> torch.Tensor:
    """A map (B, D, H, W) row by row, (B, H * W, D); anything else as it is."""
    return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output


def _source(model: str) -> Source:
    try:
        model_type = PreTrainedConfig.get_config_dict(model)[0].get("model_type")
    except (OSError, HFValidationError) as error:
        raise UserError(f"{model} is neither a folder here nor a model that the Hub gives: {error}") from error
    if model_type is None:
        raise UserError(f"{model} has no config.json that names a model_type; pass what save_pretrained wrote")
    if model_type not in SOURCES:
        raise UserError(f"{model} is a {model_type!r}; convert knows {', '.join(sorted(SOURCES))}")
    return SOURCES[model_type]


def _auto_class(config: PreTrainedConfig, source: Source, wanted: str | None) -> str:
    """The Auto class that is `wanted`, or that of the checkpoint, by its class's name."""
    trunk: Any = transformers.MODEL_MAPPING[type(config)]
    family = trunk.__name__.removesuffix("Model")
    known = {family + suffix: auto_class for suffix, auto_class in source.heads.items()}
    if wanted is not None:
        if wanted not in known.values():
            raise UserError(
                f"auto_class={wanted!r} cannot be made of a {config.model_type!r}; choose "
                f"{' or '.join(known.values())}"
            )
        return wanted
    architecture = (config.architectures or ["(no architecture)"])[0]
    if architecture not in known:
        raise UserError(
            f"{architecture} cannot be converted, but {', '.join(known)} can; to keep a part of it, say which: "
            f"auto_class={' or '.join(known.values())}"
        )
    return known[architecture]


def _check_settings(config: PreTrainedConfig, source: Source) -> None:
    """Raises: UserError naming every setting that our model does not have."""
    problems = [
        f"{name}={getattr(config, name)!r} (only {' or '.join(map(repr, values))})"
        for name, values in source.allowed.items()
        if hasattr(config, name) and getattr(config, name) not in values
    ]
    if problems:
        raise UserError(f"this {config.model_type!r} cannot be converted: {'; '.join(problems)}")


def _load(model: str, auto_class: str) -> PreTrainedModel:
    """Their model, of saved weights only.  Raises: UserError naming those that it lacks, which would be random.

    Some checkpoints come without the pooler that AutoModel would add.
    """
    from_pretrained = getattr(transformers, auto_class).from_pretrained
    theirs, found = from_pretrained(model, dtype="auto", output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if auto_class == "AutoModel" and missing and all(name.startswith("pooler.") for name in missing):
        return from_pretrained(model, dtype="auto", add_pooling_layer=False).eval()
    if missing:
        raise UserError(
            f"{model} has no weights for the {type(theirs).__name__} that auto_class={auto_class!r} asks for: "
            f"{_shortened(missing)}; convert what it has (AutoModel keeps the trunk), and fine-tune that"
        )
    return theirs.eval()


def _shared_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields that have the same name in every configuration."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id")
    fields = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return fields | ({"problem_type": config.problem_type} if config.problem_type else {})


def _processors(model: str) -> list[Any]:
    """Tokenizer and image processor, as far as they are there: what they do stays the same, so they stay theirs."""
    loaders: dict[str, Any] = {"tokenizer_config.json": AutoTokenizer, "preprocessor_config.json": AutoImageProcessor}
    return [
        loader.from_pretrained(model)
        for file_name, loader in loaders.items()
        if cached_file(model, file_name, _raise_exceptions_for_missing_entries=False)
    ]


def _image_size(processors: list[Any]) -> int | None:
    """Pixels per side of what an image processor among them makes."""
    for processor in processors:
        if isinstance(processor, BaseImageProcessor):
            settings: Any = processor  # the base class declares none of what follows
            size = settings.crop_size if settings.do_center_crop else settings.size
            return size.get("height") or size.get("shortest_edge")
    return None


def _shortened(problems: list[str]) -> str:
    return "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
