"""Checkpoints: a loadable Hugging Face repository each, with what a run needs to go on exactly where it was.

    <output_dir>/checkpoints/step-00000100/
        config.json, model.safetensors, tokenizer, code ...     what from_pretrained reads
        training_state/optimizer.safetensors                    optimizer state by parameter name
        training_state/averages.safetensors                     averaged weights by name, if the run averages
        (each of these three is model-00001-of-00002.safetensors ... where two processes wrote it, see tensor_files.py)
        training_state/randomness.safetensors                   generators, one row for each process
        training_state/carried.safetensors                      a recurrent state for each row of a step, if carried on
        training_state/state.json, config.json                  step, counters; resolved configuration of the run
        manifest.json                                           size and sha256 of every file above

A checkpoint is written beside its final place, flushed to the disk, listed in the manifest and then renamed, so a
folder with its final name is whole, unless the disk has damaged it later: its manifest shows that, and it is passed
over. Nothing is pickled.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from bmtk.errors import UserError
from bmtk.files import adding_to_folder, flush

from .agreement import of_all, of_main, together
from .guards import GuardState, broken_weights
from .manifest import damages, dump_json, facts_of, written_whole
from .optimizers import NamedOptimizer
from .prepared import Prepared
from .resume import check_best, delete_older, newest_whole
from .rng_state import rng_state
from .run_folder import CHECKPOINTS
from .sharding import plain_class, tied_weights, whole
from .tbptt import TBPTTState
from .tensor_files import opened, write_index, write_share

logger = logging.getLogger(__name__)

PREFIX = "step-"
RUN_STATE = "training_state"
CARRIED = "carried.safetensors"


class Processor(Protocol):
    """A tokenizer, image processor or feature extractor."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write its files into a folder."""


@dataclass
class TrainState(GuardState):
    """How far a run is.  Steps are counted from 1: `step` of them are done."""

    step: int = 0
    tokens: int = 0  # units of throughput so far (of a language model its tokens), of all processes
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated_step: int = -1  # when that was
    best: float | None = None  # value of the main metric, where a run may end early
    best_step: int = 0  # when that was
    worse: int = 0  # evaluations since then
    window_loss: float = 0.0  # summed loss since the last line of history.jsonl
    window_items: int = 0  # predicted items since then
    rng_state: dict[str, torch.Tensor] | None = None  # generators of this process, until the loop takes them over
    recurrent: TBPTTState | None = None  # recurrent state of this process's rows, where steps go on from it


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: the functions of this module, for its folder."""

    directory: str | Path
    prepared: Prepared
    processor: Processor | None = None
    config: Mapping[str, object] | None = None  # resolved configuration of the run
    keep: int = 0  # newest checkpoints that are not deleted; 0: all

    def newest(self) -> Path | None:
        """See `newest_checkpoint`."""
        return newest_checkpoint(self.directory, self.prepared.accelerator)

    def resume(self, *, log: Callable[[str], object]) -> TrainState:
        """The state after the newest whole checkpoint, whose weights are then the model's; a new one without any."""
        newest = self.newest()
        state = self.load(newest) if newest else TrainState()
        if newest:
            log(f"going on after step {state.step:,} ({newest})")
        return state

    def load(self, folder: Path) -> TrainState:
        """See `load_checkpoint`."""
        return load_checkpoint(folder, self.prepared)

    def save(self, state: TrainState) -> Path:
        """See `save_checkpoint`."""
        return save_checkpoint(
            self.directory, state, self.prepared, processor=self.processor, config=self.config, keep=self.keep
        )

    def load_best(self, state: TrainState) -> None:
        """See `load_best`."""
        load_best(self.directory, state, self.prepared)


def save_checkpoint(
    directory: str | Path,
    state: TrainState,
    prepared: Prepared,
    *,
    processor: Processor | None = None,
    config: Mapping[str, object] | None = None,
    keep: int = 0,
) -> Path:
    """Write `<directory>/checkpoints/step-<step>`, then delete all but best and `keep` newest (0: none is deleted).

    Called by every process: each writes some of the tensors, and the main one everything else.
    A whole checkpoint of the same step is left as it is.

    Raises: OSError if it cannot be written; older checkpoints are then untouched, and nothing of this one is left;
    FloatingPointError if the weights are not finite.
    """
    if broken := broken_weights(prepared.unwrapped):
        raise FloatingPointError(
            f"after step {state.step} the weights are not finite ({', '.join(broken[:3])}), so they were not saved; "
            "lower learning_rate, then run again (with overwrite_output_dir, if checkpoints are there)"
        )
    final, accelerator = Path(directory) / CHECKPOINTS / f"{PREFIX}{state.step:08d}", prepared.accelerator
    randomness = _rng_states_of_all(accelerator)
    carried = accelerator.gather(state.recurrent.rows).cpu() if state.recurrent else None
    is_main = accelerator.is_main_process
    if of_main(accelerator, bool(damages(final)) if is_main else True):

        def describe(folder: Path) -> None:
            _write_description(folder, prepared, processor)
            _write_state(folder / RUN_STATE, state, prepared, randomness)
            if carried is not None:
                save_file({"rows": carried}, folder / RUN_STATE / CARRIED)
            dump_json(folder / RUN_STATE / "config.json", dict(config or {}))

        _write_together(final, prepared, describe)
        if is_main:
            delete_older(final.parent, PREFIX, step=state.step, keep=keep, best=state.best_step)
    accelerator.wait_for_everyone()
    return final


def _write_together(final: Path, prepared: Prepared, describe: Callable[[Path], None]) -> None:
    """Write the folder `final` whole: the main process what `describe` writes, and each process its tensors."""
    accelerator, listed = prepared.accelerator, {}  # type: ignore[var-annotated]
    with ExitStack() as stack:

        def begin() -> Path | None:
            if not accelerator.is_main_process:
                return None
            writing = written_whole(final, num_bytes=_num_bytes(prepared), listed=listed)
            folder = stack.enter_context(writing)
            describe(folder)
            return folder

        folder = cast(Path, together(accelerator, begin)[0])
        for facts in together(accelerator, lambda: _write_tensors(folder, prepared)):
            listed |= facts
        together(accelerator, stack.close)


def newest_checkpoint(directory: str | Path, accelerator: Accelerator | None = None) -> Path | None:
    """Return the newest whole checkpoint of the run folder, or None if there is no checkpoint at all.

    Damaged ones are named in a warning and passed over.  Of several processes, each looks at its part of the files,
    and all come to the same answer.

    Raises: UserError if there are checkpoints, and all of them are damaged.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return newest_whole(Path(directory) / CHECKPOINTS, PREFIX, damages)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}

    def damages_by_all(folder: Path) -> list[str]:
        return list(dict.fromkeys(chain(*of_all(accelerator, damages(folder, **share)))))

    return newest_whole(Path(directory) / CHECKPOINTS, PREFIX, damages_by_all)


def load_checkpoint(folder: str | Path, prepared: Prepared) -> TrainState:
    """Put weights, optimizer and fp16 scale back, and return the state that the loop goes on from.

    The folder must be whole (see `newest_checkpoint`).  With another number of processes than the run had, the order
    of the data stays the same, but dropout draws other numbers; a warning says so.
    """
    run_state, optimizer, accelerator = Path(folder) / RUN_STATE, prepared.optimizer, prepared.accelerator
    stored = json.loads((run_state / "state.json").read_text(encoding="utf-8"))
    _load_weights(Path(folder), prepared)
    optimizer.load_state_dict({"state": read_optimizer(run_state, optimizer)})
    if optimizer.average:
        optimizer.average.load(run_state)
    if accelerator.scaler is not None and stored["scaler"]:
        accelerator.scaler.load_state_dict(stored["scaler"])
    state = TrainState(**stored["progress"])
    if stored["num_processes"] != accelerator.num_processes:
        logger.warning(
            "%s was saved by %d processes, and %d resume it: the data stay the same, but random numbers (dropout) do "
            "not; processes without a saved generator are seeded anew",
            folder,
            stored["num_processes"],
            accelerator.num_processes,
        )
    if (run_state / CARRIED).exists():
        rows = load_file(run_state / CARRIED)["rows"].to(accelerator.device)
        state.recurrent = TBPTTState(rows.tensor_split(accelerator.num_processes)[accelerator.process_index])
    if accelerator.process_index < stored["num_processes"]:
        of_all = load_file(run_state / "randomness.safetensors")
        state.rng_state = {name: rows[accelerator.process_index].clone() for name, rows in of_all.items()}
    return state


def load_best(directory: str | Path, state: TrainState, prepared: Prepared) -> None:
    """Put the weights of the best evaluation into the model; the averaged ones, if the run averages.

    Raises: UserError if its checkpoint is damaged.
    """
    folder = Path(directory) / CHECKPOINTS / f"{PREFIX}{state.best_step:08d}"
    check_best(folder)
    _load_weights(folder, prepared)
    if average := prepared.optimizer.average:
        average.load(folder / RUN_STATE)
        average.apply()


def save_model(directory: str | Path, prepared: Prepared, processor: Processor | None = None) -> None:
    """Put the model (with its code) and its processor into `directory`, which from_pretrained then reads.

    Called by every process; the main one gathers the weights and writes them.  Every file is written beside and
    renamed, config.json last: until the end there is no model to load, or the former one.
    """
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in stored_weights(prepared.unwrapped).items() if prepared.layout.is_sharded else ():
        gathered = whole(tensor.detach())
        weights |= {name: gathered.cpu()} if prepared.accelerator.is_main_process else {}
    if not prepared.accelerator.is_main_process:
        return
    with adding_to_folder(directory, last="config.json") as beside:
        with _no_bars():
            _described(prepared).save_pretrained(beside, state_dict=weights or None)
        if processor is not None:
            processor.save_pretrained(beside)


def _write_description(folder: Path, prepared: Prepared, processor: Processor | None) -> None:
    """What from_pretrained reads: configuration, code and processor, and of a single process the weights."""
    is_whole = prepared.accelerator.num_processes == 1
    with _no_bars():
        _described(prepared).save_pretrained(folder, state_dict=None if is_whole else {})
    if not is_whole:
        (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # with no tensor in it
    if processor is not None:
        processor.save_pretrained(folder)


def _described(prepared: Prepared) -> PreTrainedModel:
    """The model, or its twin where it is sharded: fully_shard has given it a class of its own."""
    model = prepared.unwrapped
    return plain_twin(model) if prepared.layout.is_sharded else model


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model like a sharded one, of the class that it had before, and without weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)
    with torch.device("meta"):
        twin: PreTrainedModel = plain_class(model)._from_config(config, dtype=model.dtype)
    if model.can_generate():
        twin.generation_config = model.generation_config
    return twin


def _write_tensors(folder: Path, prepared: Prepared) -> dict[str, dict[str, object]]:
    """Write this process's part of weights, optimizer state and averages; return what the manifest says of it."""
    accelerator, optimizer = prepared.accelerator, prepared.optimizer
    weights, run_state = stored_weights(prepared.unwrapped), folder / RUN_STATE
    names: list[str] = []
    if accelerator.num_processes > 1:
        names += write_share(folder, "model", weights, accelerator)
        if accelerator.is_main_process:
            write_index(folder, "model", weights, accelerator.num_processes)
    states = {"optimizer": flat(optimizer.state_dict()["state"])}
    if optimizer.average:
        states["averages"] = optimizer.average.state_dict()
    for stem, tensors in states.items():
        names += [f"{RUN_STATE}/{name}" for name in write_share(run_state, stem, tensors, accelerator)]
    for name in names:
        flush(folder / name)
    return facts_of(folder, names)


def stored_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a model without what is tied to another weight, which safetensors does not store twice."""
    tied = tied_weights(model)
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def _write_state(folder: Path, state: TrainState, prepared: Prepared, randomness: dict[str, torch.Tensor]) -> None:
    accelerator = prepared.accelerator
    folder.mkdir()
    progress = {name: value for name, value in vars(state).items() if name not in ("rng_state", "recurrent")}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    stored = {"progress": progress, "num_processes": accelerator.num_processes, "scaler": scaler}
    dump_json(folder / "state.json", stored)
    save_file(randomness, folder / "randomness.safetensors")


def flat(by_parameter: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Turn {"weight": {"exp_avg": tensor}} into {"exp_avg/weight": tensor}."""
    return {f"{key}/{name}": value for name, values in by_parameter.items() for key, value in values.items()}


def read_optimizer(folder: Path, optimizer: NamedOptimizer) -> dict[str, dict[str, torch.Tensor]]:
    """{"weight": {"exp_avg": tensor}} of what `flat` stored: of each tensor what this process holds of the weight."""
    parameters = {name: parameter for parameter, name in optimizer.names.items()}
    state: dict[str, dict[str, torch.Tensor]] = {}
    with opened(folder, "optimizer") as files:
        for flat_name in files:
            key, _, name = flat_name.partition("/")
            state.setdefault(name, {})[key] = files.read(flat_name, like=parameters.get(name))
    return state


def _load_weights(folder: Path, prepared: Prepared) -> None:
    """Copy the weights bit by bit; of sharded ones, each process reads its part.

    A whole model is read by from_pretrained, which knows shards, ties and renamed keys.
    """
    model = prepared.unwrapped
    if prepared.layout.is_sharded:
        return load_parts(folder, model)
    with _no_bars():
        loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    stored, facts = loaded
    wrong = {kind: names for kind, names in facts.items() if names}
    if wrong:
        raise UserError(f"the weights in {folder} do not fit {type(model).__name__}: {wrong}")
    model.load_state_dict(stored.state_dict())


@torch.no_grad()
def load_parts(folder: Path, model: PreTrainedModel) -> None:
    weights = stored_weights(model)
    with opened(folder, "model") as files:
        if set(files) != set(weights):
            wrong = ", ".join(sorted(set(files) ^ set(weights))[:3])
            raise UserError(f"the weights in {folder} do not fit {plain_class(model).__name__}: {wrong}")
        for name, value in weights.items():
            value.copy_(files.read(name, like=value))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep the bars of transformers from tearing the run's own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _rng_states_of_all(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Generators of all processes, stacked: (processes, ...)."""
    own = {name: value[None].to(accelerator.device) for name, value in rng_state().items()}
    return {name: accelerator.gather(value).cpu() for name, value in own.items()}


def _num_bytes(prepared: Prepared) -> int:
    optimizer = prepared.optimizer
    tensors = [
        *prepared.model.state_dict().values(),
        *(t for state in optimizer.state.values() for t in state.values()),
    ]
    tensors += optimizer.average.state_dict().values() if optimizer.average else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
