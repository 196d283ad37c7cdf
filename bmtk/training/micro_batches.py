"""How many rows a forward pass takes: as many as were asked for or found by trial, halved where memory was too little.

    <output_dir>/micro_batches.json      {"limits": [[step, rows], ...]}: at most so many rows from that step on

The size is a function of the step (counted from 0) and of this list, so a resumed run takes the very sizes that the
run had before it was interrupted, at the very steps.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate import Accelerator

from bmtk.errors import UserError, is_out_of_memory
from bmtk.files import read_json, write_json

from .agreement import of_main
from .arguments import AUTO, LoopArguments
from .guards import SavedBuffers
from .memory import available_memory, peak_memory
from .protocols import Batch, TrainBatches, TrainingObjective
from .rng_state import preserved_rng_state
from .signals import StopRequest
from .updates import Losses, LossSum, Update, Updater

if TYPE_CHECKING:  # Trainer's arguments take a fifth of a second
    from .finetuning_arguments import FineTuningArguments

logger = logging.getLogger(__name__)

FILE = "micro_batches.json"
USABLE = 0.9  # part of the memory that `auto` fills at most: rows differ, and memory is cut into pieces
MANY = 10_000  # rows whose lengths are looked at
REMEDIES = (
    "set gradient_checkpointing, shorten the rows (context_length, max_length, smaller images), choose a smaller "
    "model, or a device with more memory"
)


class MicroBatches:
    """The rows of a forward pass at each step of one run, equal on all processes."""

    def __init__(
        self, directory: str | Path, accelerator: Accelerator, check: Callable[[int], None] | None, *, rows: int
    ):
        """`rows` are asked for (0: the share of the process); `check(n)` refuses n micro-batches per step."""
        self.path, self.accelerator, self.check, self.rows = Path(directory) / FILE, accelerator, check, rows
        stored: Any = of_main(accelerator, read_json(self.path))
        self.limits: list[list[int]] = stored["limits"] if stored else []

    def at(self, step: int) -> int:
        """The rows of a forward pass in optimizer step `step`; 0: the share of the process."""
        limits = [rows for first, rows in self.limits if first <= step]
        return min([*limits, *([self.rows] if self.rows else [])], default=0)

    def limit(self, step: int, rows: int, *, is_writer: bool) -> None:
        """Take at most `rows` from `step` on, also when the run is resumed."""
        self.limits.append([step, rows])
        if is_writer:
            write_json(self.path, {"limits": self.limits})

    def halve(self, step: int, rows: int, *, share: int, model: torch.nn.Module, is_writer: bool = True) -> None:
        """Take half of `rows` from `step` on, because memory was too little; `share` are those of this process.

        Raises: UserError if it was one row, or if smaller micro-batches would change what is learned.
        """
        where = f"step {step + 1}: out of memory with {rows} row{'s' * (rows > 1)} in a forward pass"
        if rows == 1:
            raise UserError(f"{where}: {REMEDIES}")
        half = -(-rows // 2)
        refuse_changed_loss(model, self.check, -(-share // half) * self.accelerator.num_processes, where)
        self.limit(step, half, is_writer=is_writer)
        if is_writer:
            logger.warning("%s; from now on %d rows, and as many more forward passes per step", where, half)


def refuse_changed_loss(
    model: torch.nn.Module, check: Callable[[int], None] | None, count: int, where: str = "micro_batch_size=auto"
) -> None:
    """Raises: UserError if a step of `count` micro-batches would have another loss than one of a whole batch."""
    try:
        if check:
            check(count)
    except UserError as error:
        raise UserError(f"{where}, and smaller micro-batches would change the loss: {error}; {REMEDIES}") from error
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(
            f"{where}, and smaller micro-batches would change the loss, because the statistics of BatchNorm are those "
            f"of a micro-batch; choose micro_batch_size yourself, or {REMEDIES}"
        )


def step_within_memory(
    updater: Updater, batches: TrainBatches, sizes: MicroBatches, data: int, number: int, *, request: StopRequest
) -> Update:
    """Make optimizer step `number` of the rows of `batches[data]`, in micro-batches that memory is large enough for.

    Raises: UserError as `halve`; and on several processes, which cannot wait for one that tries again: the run then
    ends on all of them, and goes on with half the rows when it is resumed.
    """
    while True:
        rows = _cut(batches, sizes, number)
        micro_batches = batches[data]
        try:
            return updater.step(micro_batches, number, stop_requested=bool(request))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # The frames of the failed step, which hold its tensors, are gone only here.
        share = sum(map(num_rows, micro_batches))
        sizes.halve(number, rows or share, share=share, model=updater.unwrapped)
        refuse_to_go_on_alone(sizes.accelerator)
        free_memory()


def refuse_to_go_on_alone(accelerator: Accelerator) -> None:
    """Raises: UserError if other processes wait for this one, which has run out of memory in the middle of a step."""
    if accelerator.num_processes > 1:
        raise UserError(
            f"process {accelerator.process_index} is out of memory; run the same command again: it goes on from the "
            "last checkpoint, with half the rows in a forward pass (torchrun --max-restarts 3 repeats it by itself)"
        )


def rehearse(updater: Updater, batches: TrainBatches, sizes: MicroBatches, data: int, number: int) -> None:
    """Halve the micro-batches until a rehearsal of the step fits on every process; for several of them.

    In the step itself they wait for each other's gradients, so one could not try again alone.
    """
    accelerator, model, losses = sizes.accelerator, updater.unwrapped, updater.losses
    while accelerator.num_processes > 1:
        rows = _cut(batches, sizes, number)
        with preserved_rng_state():
            micro_batches = batches[data]
        largest = max(micro_batches, key=num_rows)
        if on_all(fits(model, largest, losses, accelerator), accelerator):
            return
        share = sum(map(num_rows, micro_batches))
        sizes.halve(number, rows or share, share=share, model=model, is_writer=accelerator.is_main_process)


def _cut(batches: TrainBatches, sizes: MicroBatches, number: int) -> int:
    """Set the size of micro-batches for optimizer step `number`, and return it."""
    if rows := sizes.at(number):
        batches.micro_batch_size = rows
    return rows


def on_all(fitted: bool, accelerator: Accelerator) -> bool:
    """Whether it is so on all processes."""
    failed = torch.tensor(int(not fitted), device=accelerator.device)
    return not (accelerator.reduce(failed) if accelerator.num_processes > 1 else failed)


def fits(model: torch.nn.Module, batch: Batch, losses: Losses, accelerator: Accelerator) -> bool:
    """Whether forward and backward over a batch fit into memory; weights, buffers and generators stay as they are."""
    buffers, one = SavedBuffers(model.modules()), torch.ones((), dtype=torch.int64, device=accelerator.device)
    loss_sum = LossSum(model, cast(Any, model), accelerator.device, losses)
    with preserved_rng_state():
        try:
            with accelerator.autocast():
                loss = loss_sum(batch, int(losses.num_items(batch)), one)
            loss.backward()
            fitted = True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            fitted = False
    model.zero_grad(set_to_none=True)
    buffers.restore()
    if not fitted:
        free_memory()
    return fitted


def num_rows(batch: Batch) -> int:
    """The rows of a batch: the first dimension of its tensors."""
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)


def split_rows(batch: Batch, rows: int | None) -> list[Batch]:
    """A collated batch in parts of at most `rows` rows.

    >>> [part["labels"] for part in split_rows({"labels": torch.arange(3), "mean": torch.ones(())}, 2)]
    [tensor([0, 1]), tensor([2])]

    Raises: UserError if its values do not all have an entry for each row, or `rows` is None: it is known that they
    have not.
    """
    count = num_rows(batch)
    by_row = {name for name, value in batch.items() if _has_entries(value)}
    if rows is None or any(len(batch[name]) != count for name in by_row):
        raise UserError(
            f"out of memory, and batches with {', '.join(sorted(by_row))} cannot be cut into smaller ones: lower "
            f"micro_batch_size, or {REMEDIES}"
        )
    cuts = [slice(start, start + rows) for start in range(0, count, rows)]
    return [{name: value[cut] if name in by_row else value for name, value in batch.items()} for cut in cuts]


def _has_entries(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)


def free_memory() -> None:
    """Give back what a failed forward pass has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# micro_batch_size=auto -----------------------------------------------------------------------------------------------


def choose_micro_batches(
    args: "LoopArguments | FineTuningArguments",
    batches: TrainBatches,
    objective: TrainingObjective,
    model: torch.nn.Module,
    accelerator: Accelerator,
) -> None:
    """With micro_batch_size=auto, cut `batches` as memory allows; a resumed run has what it has found before."""
    if args.micro_batch_size != AUTO:
        return
    sizes = MicroBatches(args.output_dir, accelerator, None, rows=0)
    share = batches.batch_size * getattr(args, "tp_size", 1) // accelerator.num_processes
    batches.micro_batch_size = sizes.at(0) or largest_fitting(
        share, objective, model, Losses.of(objective), accelerator
    )


def largest_fitting(
    share: int, objective: TrainingObjective, model: torch.nn.Module, losses: Losses, accelerator: Accelerator
) -> int:
    """The largest power of two that divides `share` rows, and whose longest rows fit into memory with a margin.

    Raises: UserError if not even one row fits, or if micro-batches would change the loss.
    """
    model.to(accelerator.device).train()
    found, margin = 0, Margin(model, accelerator.device)
    for rows in powers_of_two(share):
        fitted = margin.allows_twice and fits(model, longest_rows(objective, rows), losses, accelerator)
        if not on_all(fitted and margin.is_kept(), accelerator):
            break
        found = rows
    if not found:
        raise UserError(f"micro_batch_size=auto: not even one row fits into memory: {REMEDIES}")
    if found < share:
        refuse_changed_loss(model, objective.check_micro_batches, share // found * accelerator.num_processes)
    return found


class Margin:
    """Watches what trials of growing size take, so that no more than `USABLE` of the memory is filled.

    A GPU counts what it has handed out at most; the optimizer's two moments are yet to come.  A system may end a
    process that fills its memory, instead of refusing it, so on a CPU the next trial is not made where twice the last
    one's need would be too much.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.device, self.growth = device, 0
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.to_come = 2 * 4 * trained
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.room, self.peak = self._room(), self._peak()

    @property
    def allows_twice(self) -> bool:
        """Whether twice the need of the last trial would do."""
        return self.device.type == "cuda" or 2 * self.growth + self.to_come <= USABLE * self.room

    def is_kept(self) -> bool:
        """Whether the need of the trials up to now leaves enough."""
        self.growth = self._peak() - self.peak
        return self.growth + self.to_come <= USABLE * self.room

    def _room(self) -> int:
        """Bytes that could still be taken."""
        if self.device.type == "cuda":
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + kept
        return available_memory()

    def _peak(self) -> int:
        """The most bytes that this process has had at a time."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_memory()


def powers_of_two(share: int) -> Iterator[int]:
    """1, 2, 4, ... as long as they divide `share`."""
    rows = 1
    while share % rows == 0:
        yield rows
        rows *= 2


def longest_rows(objective: TrainingObjective, count: int) -> Batch:
    """A batch of the `count` longest training rows, as far as their lengths are known."""
    rows = objective.rows["train"]
    columns = getattr(rows, "column_names", ())
    if "length" in columns or "input_ids" in columns:
        some = rows.select(range(min(len(rows), MANY)))
        lengths = some["length"] if "length" in columns else list(map(len, some["input_ids"]))
        rows = some.select(np.argsort(-np.asarray(lengths), kind="stable")[:count])
    return next(objective.batches_in_order(rows, batch_size=count))
