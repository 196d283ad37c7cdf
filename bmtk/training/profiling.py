"""A rehearsal: how long a step takes and what memory it needs, by steps that leave the weights as they are."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .arguments import LoopArguments
from .guards import SavedBuffers
from .optimizers import build_optimizer
from .prepared import Prepared
from .protocols import TrainBatches, TrainingObjective
from .rng_state import preserved_rng_state
from .tbptt import check_carries, tbptt_state
from .throughput import flops_per_unit
from .updates import Losses, LossSum, Updater

SECONDS = 1.0  # that the steps of a rehearsal take together, at least
FEWEST, MOST = 3, 50  # of them


def seconds_per_step(model: Any, batches: TrainBatches, accelerator: Accelerator, losses: Losses) -> float:
    """Seconds of forward and backward over the micro-batches of the first step: of two tries, as the first warms up.

    Leaves the weights as they are and no gradients behind; the optimizer's own time is not in it.
    Raises: UserError if the batches go on from a state that the model does not have.
    """
    if batches.carries_state:
        check_carries(model)
    model = model.to(accelerator.device).train()
    loss_sum = LossSum(model, model, accelerator.device, losses)
    one = torch.ones((), dtype=torch.int64, device=accelerator.device)
    for _ in range(2):
        started = time.perf_counter()
        for batch in batches[0]:
            with accelerator.autocast():
                value = loss_sum(batch, int(losses.num_items(batch)), one)
            value.backward()
        model.zero_grad(set_to_none=True)
        _wait_for(accelerator.device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Rehearsal:
    """What a whole optimizer step costs on this machine."""

    seconds: float  # of a step with everything in it: batch, forward, backward, clipping, optimizer
    num_steps: int  # that were measured, after one that was not
    num_bytes: int  # weights, gradients, optimizer state, and what one micro-batch keeps for its backward pass


def rehearse(
    model: Any, batches: TrainBatches, accelerator: Accelerator, losses: Losses, args: LoopArguments
) -> Rehearsal:
    """Take whole steps at a learning rate of 0, with an optimizer of their own.

    Weights, buffers and random numbers are as before when it returns.  Of several processes, each has its own share of
    the rows, and the slowest counts; the exchange of gradients is not in it, nor is compilation.
    """
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model = model.to(accelerator.device)
    buffers, was_training = SavedBuffers(model.modules()), model.training
    optimizer = build_optimizer(model.train(), replace(args, learning_rate=0.0, muon_learning_rate=0.0))
    state = tbptt_state(batches)
    prepared = Prepared(model, optimizer, accelerator)
    updater = Updater(prepared, losses, max_grad_norm=args.max_grad_norm, recurrent=state)
    with preserved_rng_state(), autocast_in(model, accelerator):
        with kept_for_backward(model) as storages:
            updater.step(batches[0][:1])
        if state:
            state.rows = None  # a state of the first micro-batch's rows only
        # All processes take as many steps, because they add up their counts in each.
        num_steps = min(max(math.ceil(SECONDS / _timed(updater, batches, range(1), accelerator)), FEWEST), MOST)
        seconds = _timed(updater, batches, range(1, 1 + num_steps), accelerator)
    buffers.restore()
    model.train(was_training)
    fixed = [*_twice(model.parameters()), *(t for kept in optimizer.state.values() for t in kept.values())]
    return Rehearsal(seconds, num_steps, sum(t.nbytes for t in fixed) + sum(storages.values()))


def _timed(updater: Updater, batches: TrainBatches, steps: range, accelerator: Accelerator) -> float:
    """Mean seconds of `steps` on the slowest process."""
    _wait_for(accelerator.device)
    started = time.perf_counter()
    for step in steps:
        updater.step(batches[step])
        _wait_for(accelerator.device)
    mean = torch.tensor([(time.perf_counter() - started) / len(steps)], device=accelerator.device)
    return float(accelerator.gather(mean).max())


def costs(
    model: PreTrainedModel, objective: TrainingObjective, rehearsal: Rehearsal, *, num_rows: int
) -> dict[str, str]:
    """Floating-point operations of a run over `num_rows` rows, and the memory of a process, in words."""
    row = next(objective.batches_in_order(objective.rows["train"], batch_size=1))
    flops = flops_per_unit(model, objective.unit, row) * num_rows * objective.units_per_row("train")
    return {
        "FLOPs": f"{flops:.3g}",
        "memory": f"at least {rehearsal.num_bytes / 1e6:,.0f} MB (weights, gradients, optimizer, one micro-batch)",
    }


@contextmanager
def autocast_in(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Forward passes in the precision of the run, which `Accelerator.prepare` would make for good."""
    model.forward = accelerator.autocast()(model.forward)
    try:
        yield
    finally:
        del model.forward  # of this object; that of its class is there again


def _twice(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The weights, and again for the gradients of those that have some."""
    for parameter in parameters:
        yield parameter
        if parameter.requires_grad:
            yield parameter


@contextmanager
def kept_for_backward(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """The memory that forward passes in the body keep for their backward passes: its address -> bytes.

    Without the weights themselves.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
