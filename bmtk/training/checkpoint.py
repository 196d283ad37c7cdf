"""Checkpoints: a loadable Hugging Face repository each, with what a run needs to go on exactly where it was.

    <output_dir>/checkpoints/step-00000100/
        config.json, model.safetensors, tokenizer, code ...     what from_pretrained reads
        training_state/optimizer.safetensors                    optimizer state by parameter name
        training_state/averages.safetensors                     averaged weights by name, if the run averages
        (each of these three is model-00001-of-00002.safetensors ... where two processes wrote it, see tensor_files.py)
        training_state/randomness.safetensors                   generators, one row for each process
        training_state/carried.safetensors                      a recurrent state for each row of a step, if carried on
        training_state/state.json, config.json                  step, counters; resolved configuration of the run
        manifest.json                                           size and hash of every file above

A checkpoint is written beside its final place, flushed to the disk, listed in the manifest and then renamed, so a
folder with its final name is whole, unless the disk has damaged it later: its manifest shows that, and it is passed
over. Nothing is pickled.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from bmtk.errors import UserError
from bmtk.files import adding_to_folder, flush

from .agreement import of_all, of_main, together
from .background import BackgroundSaver
from .description import Description, Processor, no_bars, plain_twin
from .guards import GuardState
from .manifest import damages, dump_json, facts_of, written_whole
from .optimizers import NamedOptimizer
from .prepared import Prepared
from .resume import check_best, delete_older, newest_whole, step_of
from .rng_state import RngState
from .run_folder import CHECKPOINTS
from .sharding import plain_class, whole
from .snapshot import Connections, Snapshot, has_memory, stored_weights
from .tbptt import TBPTTState
from .tensor_files import opened, write_index, write_share
from .waits import named_waits

logger = logging.getLogger(__name__)

PREFIX = "step-"
RUN_STATE = "training_state"
CARRIED = "carried.safetensors"


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


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    directory: str | Path
    prepared: Prepared
    processor: Processor | None = None
    config: Mapping[str, object] | None = None  # resolved configuration of the run
    keep: int = 0  # newest checkpoints that are not deleted; 0: all
    in_background: bool = False  # whether training goes on while a checkpoint is written, where memory allows it
    saver: BackgroundSaver = field(default_factory=BackgroundSaver)
    copies: bool | None = field(default=None, init=False)  # whether memory does; None: not known yet

    def newest(self) -> Path | None:
        """See `newest_checkpoint`."""
        self.saver.finish()
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
        self.saver.finish()
        return load_checkpoint(folder, self.prepared)

    def load_best(self, state: TrainState) -> None:
        """See `load_best`."""
        self.saver.finish()
        load_best(self.directory, state, self.prepared)

    def save(self, state: TrainState) -> Path:
        """Write `<directory>/checkpoints/step-<step>`, then delete all but best and `keep` newest.

        Called by every process: each writes some of the tensors, and the main one everything else.
        A whole checkpoint of the same step is left as it is.  What is saved in the background is there when
        `saver.finish` returns, which raises its errors; whoever changes the state calls `saver.wait_for_copy` before.

        Raises: OSError if it cannot be written; older checkpoints are then untouched, and nothing of this one is left;
        FloatingPointError if the weights are not finite; also of the save before, if that was in the background.
        """
        self.saver.finish()
        connections, snapshot = self._connections, Snapshot.of(self.prepared)
        connections.connect(snapshot.tensors)
        copies = self._copies(snapshot)
        final = Path(self.directory) / CHECKPOINTS / f"{PREFIX}{state.step:08d}"
        writing = Writing(final, snapshot, self.prepared.accelerator, connections.group)
        description, facts = self._description, Facts.of(state, self.prepared, self.config)

        def describe(folder: Path) -> None:
            description.write(folder, snapshot.weights if writing.is_alone else None)
            facts.write(folder / RUN_STATE)

        self.saver.start(
            copy=partial(snapshot.move_to_host, connections, copies=copies),
            write=partial(writing.write, describe, keep=self.keep, best=state.best_step),
        )
        if not copies:
            self.saver.finish()
        return final

    @cached_property
    def _connections(self) -> Connections:
        return Connections(self.prepared)

    @cached_property
    def _description(self) -> Description:
        return Description(self.prepared, self.processor)

    def _copies(self, snapshot: Snapshot) -> bool:
        """Whether a save copies the state; what memory allowed for the first one, it does for the later ones."""
        if self.copies is None:
            needed = snapshot.memory_for_copies()
            self.copies = self.in_background and has_memory(needed)
            if self.in_background and not self.copies:
                logger.warning(
                    "no memory for a copy of what process %d saves (%.1f GB): training waits for each save",
                    self.prepared.accelerator.process_index,
                    needed / 1e9,
                )
        return self.copies


def save_checkpoint(
    directory: str | Path,
    state: TrainState,
    prepared: Prepared,
    *,
    processor: Processor | None = None,
    config: Mapping[str, object] | None = None,
    keep: int = 0,
) -> Path:
    """Save one checkpoint as `Checkpoints.save` does, and wait for it."""
    return Checkpoints(directory, prepared, processor, config, keep).save(state)


@dataclass(frozen=True)
class Writing:
    """How the processes of a run write one checkpoint, each in a thread, with connections of their own."""

    final: Path
    snapshot: Snapshot
    accelerator: Accelerator
    group: Any  # their connections

    @property
    def is_alone(self) -> bool:
        """Whether one process writes everything."""
        return self.accelerator.num_processes == 1

    def write(self, describe: Callable[[Path], None], *, keep: int, best: int) -> None:
        """Write the folder, and delete older ones; the main process writes what `describe` does.

        Raises: as `Checkpoints.save`, on all processes.
        """
        with named_waits(self.accelerator, f"writing {self.final}"):
            self._write(describe, keep=keep, best=best)

    def _write(self, describe: Callable[[Path], None], *, keep: int, best: int) -> None:
        self._refuse_broken_weights()
        is_main, final = self.accelerator.is_main_process, self.final
        if not of_main(self.accelerator, bool(damages(final)) if is_main else True, self.group):
            return
        self._write_together(describe)

        def delete() -> None:
            if is_main:
                delete_older(final.parent, PREFIX, step=step_of(final), keep=keep, best=best)

        together(self.accelerator, delete, self.group)

    def _refuse_broken_weights(self) -> None:
        found = of_all(self.accelerator, self.snapshot.broken_weights(), self.group)
        if broken := list(dict.fromkeys(chain(*found))):
            raise FloatingPointError(
                f"after step {step_of(self.final)} the weights are not finite ({', '.join(broken[:3])}), so they were "
                "not saved; lower learning_rate, then run again (with overwrite_output_dir, if checkpoints are there)"
            )

    def _write_together(self, describe: Callable[[Path], None]) -> None:
        listed: dict[str, dict[str, object]] = {}
        with ExitStack() as stack:

            def begin() -> Path | None:
                if not self.accelerator.is_main_process:
                    return None
                writing = written_whole(self.final, num_bytes=self.snapshot.num_bytes, listed=listed)
                folder = stack.enter_context(writing)
                describe(folder)
                return folder

            folder = cast(Path, together(self.accelerator, begin, self.group)[0])
            for facts in together(self.accelerator, lambda: self._write_tensors(folder), self.group):
                listed |= facts
            together(self.accelerator, stack.close, self.group)

    def _write_tensors(self, folder: Path) -> dict[str, dict[str, object]]:
        """Write this process's part of the tensors; return what the manifest says of it."""
        accelerator, weights = self.accelerator, self.snapshot.weights
        names: list[str] = []
        if not self.is_alone:
            names += write_share(folder, "model", weights, accelerator)
            if accelerator.is_main_process:
                write_index(folder, "model", weights, accelerator.num_processes)
        for stem, tensors in self.snapshot.states.items():
            names += [f"{RUN_STATE}/{name}" for name in write_share(folder / RUN_STATE, stem, tensors, accelerator)]
        for name in names:
            flush(folder / name)
        return facts_of(folder, names)


@dataclass(frozen=True)
class Facts:
    """What a checkpoint holds beside the tensors of model and optimizer, as it was when the save began."""

    stored: dict[str, Any]
    randomness: dict[str, torch.Tensor]  # generators of all processes
    carried: torch.Tensor | None  # recurrent state of all rows of a step
    config: dict[str, object]

    @classmethod
    def of(cls, state: TrainState, prepared: Prepared, config: Mapping[str, object] | None) -> "Facts":
        """Called by every process."""
        accelerator = prepared.accelerator
        progress = {name: value for name, value in vars(state).items() if name not in ("rng_state", "recurrent")}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
        stored = {"progress": progress, "num_processes": accelerator.num_processes, "scaler": scaler}
        carried = accelerator.gather(state.recurrent.rows).cpu().clone() if state.recurrent else None
        return cls(copy.deepcopy(stored), _rng_states_of_all(accelerator), carried, dict(config or {}))

    def write(self, folder: Path) -> None:
        """Make `folder`, and fill it."""
        folder.mkdir()
        dump_json(folder / "state.json", self.stored)
        save_file(self.randomness, folder / "randomness.safetensors")
        if self.carried is not None:
            save_file({"rows": self.carried}, folder / CARRIED)
        dump_json(folder / "config.json", self.config)


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
        model = plain_twin(prepared.unwrapped) if prepared.layout.is_sharded else prepared.unwrapped
        with no_bars():
            model.save_pretrained(beside, state_dict=weights or None)
        if processor is not None:
            processor.save_pretrained(beside)


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
    with no_bars():
        loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    stored, facts = loaded
    wrong = {kind: names for kind, names in facts.items() if names}
    if wrong:
        raise UserError(f"the weights in {folder} do not fit {type(model).__name__}: {wrong}")
    model.load_state_dict(stored.state_dict())


@torch.no_grad()
def load_parts(folder: Path, model: PreTrainedModel) -> None:
    """Copy the weights bit by bit, of each what this process holds.  Raises: UserError if they do not fit."""
    weights = stored_weights(model)
    with opened(folder, "model") as files:
        if set(files) != set(weights):
            wrong = ", ".join(sorted(set(files) ^ set(weights))[:3])
            raise UserError(f"the weights in {folder} do not fit {plain_class(model).__name__}: {wrong}")
        for name, value in weights.items():
            value.copy_(files.read(name, like=value))


def _rng_states_of_all(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Generators of all processes, stacked: (processes, ...)."""
    own = {name: value[None].to(accelerator.device) for name, value in RngState().items()}
    return {name: accelerator.gather(value).cpu() for name, value in own.items()}
