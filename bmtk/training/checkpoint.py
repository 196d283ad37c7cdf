"""Checkpoints: a loadable Hugging Face repository each, with what a run needs to go on exactly where it was.

    <output_dir>/checkpoints/step-00000100/
        config.json, model.safetensors, tokenizer, code ...     what from_pretrained reads
        training_state/optimizer.safetensors                    optimizer state by parameter name
        training_state/averages.safetensors                     averaged weights by name, if the run averages
        training_state/randomness.safetensors                   generators, one row for each process
        training_state/carried.safetensors                      a recurrent state for each row of a step, if carried on
        training_state/state.json, config.json                  step, counters; resolved configuration of the run
        manifest.json                                           size and sha256 of every file above

A checkpoint is written beside its final place, flushed to the disk, listed in the manifest and then renamed, so a
folder with its final name is whole, unless the disk has damaged it later: its manifest shows that, and it is passed
over. Nothing is pickled.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from bmtk.errors import UserError
from bmtk.files import adding_to_folder

from .guards import broken_weights
from .manifest import damages, dump_json, written_whole
from .prepared import Prepared
from .resume import check_best, delete_older, newest_whole
from .rng_state import rng_state
from .run_folder import CHECKPOINTS
from .tbptt import TBPTTState

logger = logging.getLogger(__name__)

PREFIX = "step-"
RUN_STATE = "training_state"
CARRIED = "carried.safetensors"


class Processor(Protocol):
    """A tokenizer, image processor or feature extractor."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write its files into a folder."""


@dataclass
class TrainState:
    """How far a run is.  Steps are counted from 1: `step` of them are done."""

    step: int = 0
    tokens: int = 0  # units of throughput so far (of a language model its tokens), of all processes
    seconds: float = 0.0  # of training, without evaluations and checkpoints
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated_step: int = -1  # when that was
    best: float | None = None  # value of the main metric, where a run may end early
    best_step: int = 0  # when that was
    worse: int = 0  # evaluations since then
    skipped: list[int] = field(default_factory=list)  # steps whose update was not finite, or spiked, and not applied
    left_out: list[int] = field(default_factory=list)  # steps in the order of the data that no step takes rows from
    failed_at: int = -1  # steps done before the last row of bad ones that the run went back for; -1: there was none
    recent: list[list[float]] = field(default_factory=list)  # what the next steps are compared with: SpikeDetector
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
        return newest_checkpoint(self.directory)

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

    Called by every process; the main one writes.  A whole checkpoint of the same step is left as it is.

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
    if accelerator.is_main_process and damages(final):
        with written_whole(final, num_bytes=_num_bytes(prepared)) as folder:
            _write_model(folder, prepared.unwrapped, processor)
            _write_state(folder / RUN_STATE, state, prepared, randomness)
            if carried is not None:
                save_file({"rows": carried}, folder / RUN_STATE / CARRIED)
            dump_json(folder / RUN_STATE / "config.json", dict(config or {}))
        delete_older(final.parent, PREFIX, step=state.step, keep=keep, best=state.best_step)
    accelerator.wait_for_everyone()
    return final


def newest_checkpoint(directory: str | Path) -> Path | None:
    """Return the newest whole checkpoint of the run folder, or None if there is no checkpoint at all.

    Damaged ones are named in a warning and passed over.

    Raises: UserError if there are checkpoints, and all of them are damaged.
    """
    return newest_whole(Path(directory) / CHECKPOINTS, PREFIX, damages)


def load_checkpoint(folder: str | Path, prepared: Prepared) -> TrainState:
    """Put weights, optimizer and fp16 scale back, and return the state that the loop goes on from.

    The folder must be whole (see `newest_checkpoint`).  With another number of processes than the run had, the order
    of the data stays the same, but dropout draws other numbers; a warning says so.
    """
    run_state, optimizer, accelerator = Path(folder) / RUN_STATE, prepared.optimizer, prepared.accelerator
    stored = json.loads((run_state / "state.json").read_text(encoding="utf-8"))
    _load_weights(Path(folder), prepared.unwrapped)
    optimizer.load_state_dict({"state": _by_parameter(load_file(run_state / "optimizer.safetensors"))})
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
    _load_weights(folder, prepared.unwrapped)
    if average := prepared.optimizer.average:
        average.load(folder / RUN_STATE)
        average.apply()


def save_model(directory: str | Path, model: PreTrainedModel, processor: Processor | None = None) -> None:
    """Put the model (with its code) and its processor into `directory`, which from_pretrained then reads.

    Every file is written beside and renamed, config.json last: until the end there is no model to load, or the former
    one.
    """
    with adding_to_folder(directory, last="config.json") as beside:
        _write_model(beside, model, processor)


def _write_model(folder: Path, model: PreTrainedModel, processor: Processor | None) -> None:
    with _no_bars():
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _write_state(folder: Path, state: TrainState, prepared: Prepared, randomness: dict[str, torch.Tensor]) -> None:
    optimizer, accelerator = prepared.optimizer, prepared.accelerator
    folder.mkdir()
    progress = {name: value for name, value in vars(state).items() if name not in ("rng_state", "recurrent")}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    stored = {"progress": progress, "num_processes": accelerator.num_processes, "scaler": scaler}
    dump_json(folder / "state.json", stored)
    by_parameter = optimizer.state_dict()["state"]
    flat = {f"{key}/{name}": value for name, values in by_parameter.items() for key, value in values.items()}
    save_file({name: value.contiguous() for name, value in flat.items()}, folder / "optimizer.safetensors")
    if optimizer.average:
        optimizer.average.save(folder)
    save_file(randomness, folder / "randomness.safetensors")


def _by_parameter(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Turn {"exp_avg/weight": tensor} into {"weight": {"exp_avg": tensor}}."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for flat_name, value in flat.items():
        key, _, name = flat_name.partition("/")
        state.setdefault(name, {})[key] = value
    return state


def _load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Read the weights with from_pretrained, which knows shards, ties and renamed keys, and copy them bit by bit."""
    with _no_bars():
        loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    stored, facts = loaded
    wrong = {kind: names for kind, names in facts.items() if names}
    if wrong:
        raise UserError(f"the weights in {folder} do not fit {type(model).__name__}: {wrong}")
    model.load_state_dict(stored.state_dict())


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
