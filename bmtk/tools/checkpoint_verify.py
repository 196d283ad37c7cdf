"""`bmtk checkpoint verify`: whether a checkpoint is whole, and a run or `from_pretrained` can go on from it."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

import bmtk  # noqa: F401  registers the model families
from bmtk.errors import UserError
from bmtk.training.adapters import ADAPTER_CONFIG
from bmtk.training.checkpoint import RUN_STATE
from bmtk.training.guards import broken_weights
from bmtk.training.manifest import MANIFEST, damages
from bmtk.training.resume import NEEDED, checkpoints_of, step_of
from bmtk.training.run_folder import CHECKPOINTS

from .run_difference import flat
from .table import shown_bytes

Shape = tuple[int, ...]
LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys")


def checkpoints_in(directory: str | Path) -> list[Path]:
    """The checkpoint `directory`, or all of the run that it holds.  Raises: UserError if it is neither."""
    folder = Path(directory)
    if found := checkpoints_of(folder):
        return found
    marks = MANIFEST, "trainer_state.json", f"{RUN_STATE}/state.json"
    if not any((folder / name).is_file() for name in marks):
        raise UserError(
            f"{str(directory)!r} is neither a checkpoint nor the folder of a run with checkpoints; give one such as "
            f"outputs/pretrain/{CHECKPOINTS}/step-00000100"
        )
    return [folder]


def report(folder: Path) -> tuple[str, bool]:
    """What was checked of one checkpoint, in lines, and whether it is whole."""
    problems = list(verify(folder))
    size = shown_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    if problems:
        lines = [f"{folder} ({size}): {len(problems)} damage{'s' if len(problems) > 1 else ''}"]
        return "\n".join([*lines, *(f"  - {problem}" for problem in problems)]), False
    kind = "adapter" if (folder / ADAPTER_CONFIG).is_file() else "weights"
    return f"{folder} ({size}): whole; {kind} load and are finite, the state of the optimizer fits them", True


def verify(folder: Path) -> Iterator[str]:
    """Every damage of a checkpoint of either recipe: of its files, its weights, the state beside them."""
    yield from damages(folder)
    shapes: dict[str, Shape] = {}
    if (folder / ADAPTER_CONFIG).is_file():
        yield from _adapter_problems(folder)
    else:
        try:
            model, wrong = load(folder)
        except Exception as error:  # whatever a damaged file makes of its reader
            yield f"from_pretrained cannot load it ({type(error).__name__}: {str(error).splitlines()[0]})"
        else:
            yield from wrong
            yield from (f"{name} holds numbers that are not finite" for name in broken_weights(model))
            shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    yield from _state_problems(folder, shapes)


def load(folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """The model of a checkpoint, as its config names it, and what of its weights is missing or too much."""
    config = AutoConfig.from_pretrained(folder)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its table of weights becomes our lines
    transformers.logging.disable_progress_bar()
    try:
        loading: Any = {"config": config, "dtype": "auto", "output_loading_info": True}
        model, facts = _class_of(config).from_pretrained(folder, **loading)
    finally:
        transformers.logging.set_verbosity(verbosity)
    wrong = {kind: sorted(map(str, facts[kind])) for kind in LOADING if facts.get(kind)}
    return model, [f"weights: {kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items()]


def _class_of(config: PreTrainedConfig) -> Any:
    """The class that loads a model: the Auto class of ours, transformers' own class of others."""
    name = (config.architectures or ["AutoModel"])[0]
    of_ours = (auto for auto, reference in getattr(config, "auto_map", {}).items() if reference.endswith(f".{name}"))
    return getattr(transformers, next(of_ours, name))


def _adapter_problems(folder: Path) -> Iterator[str]:
    """An adapter is read without its base, which may be on the Hub."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        yield f"adapter_model.safetensors cannot be read ({error})"
    else:
        yield from _not_finite(tensors, "adapter_model.safetensors")


def _state_problems(folder: Path, shapes: Mapping[str, Shape]) -> Iterator[str]:
    """What is wrong beside the weights; `shapes` of the parameters are empty where these are not known."""
    is_trainers = (folder / "trainer_state.json").is_file() or not (folder / RUN_STATE).is_dir()
    name = "trainer_state.json" if is_trainers else f"{RUN_STATE}/state.json"
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        step = content["global_step"] if is_trainers else content["progress"]["step"]
        if folder.name.rpartition("-")[2].isdecimal() and step != step_of(folder):
            yield f"{name} is that of step {step}, and the folder that of step {step_of(folder)}"
        state = dict(_trainers_state(folder) if is_trainers else _own_state(folder))
    except FileNotFoundError as error:
        yield f"{Path(str(error.filename)).name} is missing"
    except Exception as error:  # whatever a damaged file makes of its reader
        yield f"the state of the run cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
    else:
        yield from _not_finite(state, "state of the optimizer")
        yield from _misfits(state, shapes) if shapes else ()


def _own_state(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(PARAMETER/KEY, tensor) of an optimizer of ours, whatever files of the state hold it."""
    files = sorted((folder / RUN_STATE).glob("*optimizer*.safetensors"))
    if not files:
        raise FileNotFoundError(2, "no such file", f"{RUN_STATE}/optimizer.safetensors")
    for path in files:
        for flat_name, tensor in load_file(path).items():
            key, _, parameter = flat_name.partition("/")
            yield f"{parameter}/{key}", tensor


def _trainers_state(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(PARAMETER/KEY, tensor) of what Trainer has saved; the parameters of torch's optimizers are numbers."""
    if missing := [names[0] for names in NEEDED if not any(any(folder.glob(name)) for name in names)]:
        raise FileNotFoundError(2, "no such file", missing[0])
    path = folder / "optimizer.pt"
    if path.is_file():  # FSDP and DeepSpeed have folders of their own
        yield from flat(torch.load(path, map_location="cpu", weights_only=True)["state"])


def _not_finite(tensors: Mapping[str, torch.Tensor], where: str) -> Iterator[str]:
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        yield f"{where}: {', '.join(broken[:3])} hold{'s' if len(broken) == 1 else ''} numbers that are not finite"


def _misfits(state: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> Iterator[str]:
    """Tensors of an optimizer that no parameter has the name of, or the shape."""
    found: dict[str, set[Shape]] = {}
    for name, value in state.items():
        found.setdefault(name.rpartition("/")[0], set()).update({tuple(value.shape)} if value.ndim else ())
    if all(parameter.isdecimal() for parameter in found):  # of torch: a number says nothing about a name
        free = Counter(shapes.values())
        free.subtract(shape for each in found.values() for shape in each)
        if wrong := [shape for shape, count in free.items() if count < 0]:
            yield f"the optimizer has state for a parameter of shape {wrong[0]}, more than the model has"
        return
    for parameter, its_shapes in found.items():
        if parameter not in shapes:
            yield f"the optimizer has state for {parameter}, which the model does not have"
        elif others := its_shapes - {shapes[parameter]}:
            yield f"the optimizer has state of shape {others.pop()} for {parameter}, which has {shapes[parameter]}"
