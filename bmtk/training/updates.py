"""One optimizer step: the micro-batches of one global batch become one update, or none.

The loss of a step is a sum over the predicted items of the global batch, divided by their number N over all
micro-batches and all processes.  So neither the micro-batch size nor the number of processes changes the gradient.

A step whose loss or gradient is not finite, or that a detector finds to spike, is never applied, and buffers such as
the statistics of BatchNorm and the carried recurrent state are then what they were before the step.  Where the
optimizer can skip on its own device, the decision stays there, and the host does not wait for it; elsewhere the host
reads one number a step.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedModel

from bmtk.errors import is_out_of_memory

from .gradients import GradientRules, gradient_norm
from .guards import SavedBuffers, sound_or_nan
from .prepared import Prepared
from .protocols import Batch, TrainingObjective
from .rng_state import RngState, set_rng_state
from .sharding import by_mesh
from .spikes import SpikeDetector
from .tbptt import TBPTTState, check_carries

Criterion = Callable[..., torch.Tensor]  # (outputs, batch) -> the sum of the batch's losses
Nested = TypeVar("Nested")


@dataclass(frozen=True)
class Losses:
    """How the losses of a batch are counted, and summed."""

    num_items: Callable[[Batch], int | torch.Tensor]  # how many losses are summed
    num_units: Callable[[Batch], int | torch.Tensor] | None = None  # what throughput counts; None: the items
    criterion: Criterion | None = None  # None: the model's own loss
    inputs_of: Callable[[Batch], Mapping[str, Any]] | None = None  # what the model reads for it; None: all but labels

    @classmethod
    def of(cls, objective: TrainingObjective, *, label_smoothing: float = 0.0) -> "Losses":
        """The losses of an objective; `label_smoothing` is passed to its criterion, which then must have one."""
        criterion = objective.criterion
        if criterion and label_smoothing:
            criterion = partial(criterion, label_smoothing=label_smoothing)
        return cls(objective.num_items, objective.num_units, criterion, objective.inputs_of)

    def counts(self, batches: Sequence[Batch]) -> tuple[list[int], int]:
        """The items of each batch, and the units of all of them."""
        num_units = self.num_units or self.num_items
        return [int(self.num_items(batch)) for batch in batches], sum(int(num_units(batch)) for batch in batches)


@dataclass(frozen=True)
class Before:
    """What a step that is not applied has changed all the same, as it was before."""

    randomness: RngState  # generators of this process
    carried: torch.Tensor | None = None  # recurrent state of its rows, where the run ends with such a step
    window: torch.Tensor | None = None  # what the step is compared with, as in SpikeDetector


@dataclass(slots=True)
class Update:
    """The result of one step; tensors are 0-dim and stay on the device until the host reads them."""

    loss: torch.Tensor  # this process's share: the sum over its items, divided by the items of all processes
    num_items: torch.Tensor  # predicted items of the global batch
    num_units: torch.Tensor  # what throughput is counted in, of the global batch
    stop_requests: torch.Tensor  # how many processes were asked to stop
    grad_norm: torch.Tensor  # L2 norm of the whole gradient, before clipping; equal on all processes
    rejected: torch.Tensor | bool  # whether the update was not applied: something was not finite, or spiked
    before: Before


def accepts_item_count(model: PreTrainedModel) -> bool:
    """Whether `model` takes num_items_in_batch; its loss need not be divided by it."""
    declared: bool | None = getattr(model, "accepts_loss_kwargs", None)
    if declared is not None:
        return declared
    parameters = inspect.signature(type(model).forward).parameters
    has_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return has_any or "num_items_in_batch" in parameters


@torch.no_grad()
def divides_by_count(model: PreTrainedModel, batch: Batch, options: Mapping[str, Any]) -> bool:
    """Whether the loss of `model` is a sum divided by num_items_in_batch; else it is a mean over the batch's items.

    Measured, because many models of transformers accept the number and drop it.  Draws no random numbers.
    """
    if not accepts_item_count(model):
        return False
    was_training = model.training
    model.eval()
    of_one, of_two = (
        model(**batch, **options, num_items_in_batch=torch.tensor(count, device=model.device)).loss.double()
        for count in (1, 2)
    )
    model.train(was_training)
    return bool((of_one - 2 * of_two).abs() <= (of_one - of_two).abs())


def on_device(batch: Nested, device: torch.device) -> Nested:
    """Copy a batch (tensors in dictionaries and lists) to the device; without waiting where memory can be pinned.

    What is neither, such as the text that a prediction is cut from, stays as it is.
    """
    moved: Nested = _moved(batch, device)
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def without_labels(batch: Batch) -> Batch:
    """The batch without the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


class LossSum:
    """Calls a model so that its loss is the sum over the batch's items, divided by a count that the caller gives."""

    def __init__(
        self,
        model: torch.nn.Module,
        unwrapped: PreTrainedModel,
        device: torch.device,
        losses: Losses | None = None,
        *,
        recurrent: TBPTTState | None = None,
    ):
        """`losses` None: the model's own.  `recurrent` is the state that rows go on from; None: they have none."""
        self.model, self.unwrapped = model, unwrapped
        self.criterion = losses.criterion if losses else None
        self.inputs_of = (losses.inputs_of if losses else None) or without_labels
        self.device, self.recurrent = device, recurrent
        self.takes_count: bool | None = None  # not known before the first batch
        parameters = inspect.signature(type(unwrapped).forward).parameters
        # With a cache, packed rows are attended across documents without a warning.
        self.options = {"use_cache": False} if "use_cache" in parameters or _caches(unwrapped) else {}
        self.can_skip_logits = can_skip_logits(unwrapped)

    def __call__(self, batch: Batch, own_items: int, count: torch.Tensor) -> torch.Tensor:
        """The loss of a batch of `own_items` items, summed and divided by `count`."""
        batch = on_device(batch, self.device)
        if self.criterion:
            return self.criterion(self.model(**self.inputs_of(batch), **self.options), batch) / count
        # A detector has a loss where there is no object, too; other losses cannot be measured without an item.
        if self.takes_count is None and (own_items or hasattr(self.unwrapped, "count_items")):
            self.takes_count = divides_by_count(self.unwrapped, batch, self.options)
        counted: dict[str, Any] = {"num_items_in_batch": count} if self.takes_count else {}
        if own_items and self.can_skip_logits:
            counted["skip_logits"] = True
        initial = self.recurrent.inputs(len(batch["input_ids"])) if self.recurrent else {}
        outputs = self.model(**batch, **self.options, **initial, **counted)
        if self.recurrent:
            self.recurrent.add(outputs.final_state)
        if self.takes_count:
            return outputs.loss
        if own_items or hasattr(self.unwrapped, "count_items"):
            return outputs.loss * (own_items / count)
        return _no_loss(outputs)  # the mean over no item is not a number


def _no_loss(outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """0, with a gradient of 0 for every parameter, as other processes wait for this one's."""
    found = (value for name, value in outputs.items() if name != "loss" and isinstance(value, torch.Tensor))
    return cast(torch.Tensor, 0.0 * sum(value.sum() for value in found if value.requires_grad))


def can_skip_logits(model: PreTrainedModel) -> bool:
    """Whether `model` can compute its loss without the logits of tokens that have no label."""
    return "skip_logits" in inspect.signature(type(model).forward).parameters


def _caches(model: PreTrainedModel) -> bool:
    return accepts_item_count(model) and hasattr(model.config, "use_cache")


class Updater:
    """Makes optimizer steps of a model."""

    def __init__(
        self,
        prepared: Prepared,
        losses: Losses,
        *,
        max_grad_norm: float,
        gradient_rules: GradientRules | None = None,
        recurrent: TBPTTState | None = None,
        stops: bool = False,
    ):
        """`gradient_rules(step)` may change the gradients of optimizer step `step` before they are clipped.

        `recurrent` is the state that the rows of a step go on from.  `stops`: the run ends with the first step that is
        not finite, so none of the steps after it is applied either, which a GPU makes before the host knows.
        """
        self.model, self.optimizer, self.accelerator = prepared.model, prepared.optimizer, prepared.accelerator
        self.unwrapped, self.stops, self.layout = prepared.unwrapped, stops, prepared.layout
        self.has_stopped: torch.Tensor | None = None
        self.losses, self.max_grad_norm = losses, max_grad_norm
        self.gradient_rules, self.recurrent = gradient_rules, recurrent
        if recurrent:
            check_carries(prepared.unwrapped)
        self.loss = LossSum(self.model, prepared.unwrapped, self.accelerator.device, losses, recurrent=recurrent)
        self.skips_on_device = self.accelerator.device.type == "cuda" and self.optimizer.can_skip_on_device
        self.spikes: SpikeDetector | None = None  # finds further steps that are not applied
        self.before_update: Callable[[], object] = lambda: None  # called before weights and optimizer state change

    def step(self, micro_batches: Sequence[Batch], number: int = 0, *, stop_requested: bool = False) -> Update:
        """Train on this process's micro-batches of optimizer step `number`, and drop the gradients afterwards."""
        buffers, before = SavedBuffers(self.unwrapped.modules()), self._before()
        counts, units = self.losses.counts(micro_batches)
        items, units_of_all, stop_requests = self._over_processes([sum(counts), units, int(stop_requested)])
        try:
            losses = self._backward(micro_batches, counts, items.clamp(min=1))
        except Exception as error:
            if is_out_of_memory(error):
                self._undo(buffers, before)
            raise
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        if self.gradient_rules:
            self.gradient_rules(number)
        grad_norm = self._clip()
        loss = sum(losses[1:], losses[0])
        bad = self._is_bad(grad_norm)
        spiked = self._is_spike(loss, grad_norm, bad)
        bad = bad | spiked
        self.before_update()
        rejected = self._apply(bad, losses, spiked=spiked)
        if self.skips_on_device:
            buffers.restore(bad)
        elif bad:
            buffers.restore()
        if self.optimizer.average:
            self.optimizer.average.update(unless=bad)
        self.optimizer.zero_grad(set_to_none=True)
        if self.recurrent:
            self.recurrent.turn(unless=bad)
        return Update(loss, items, units_of_all, stop_requests, grad_norm, rejected, before)

    def _before(self) -> Before:
        carried = self.recurrent.rows if self.recurrent and self.stops else None
        return Before(RngState(), carried, self.spikes.window if self.spikes else None)

    def _undo(self, buffers: SavedBuffers, before: Before) -> None:
        """Be as before a step whose memory was too little, so that it can be tried again."""
        self.optimizer.zero_grad(set_to_none=True)
        buffers.restore()
        set_rng_state(before.randomness)
        if self.recurrent:
            self.recurrent.after = []

    def _is_bad(self, grad_norm: torch.Tensor) -> torch.Tensor:
        bad = ~torch.isfinite(grad_norm)
        if self.stops and self.skips_on_device:
            bad = self.has_stopped = bad if self.has_stopped is None else bad | self.has_stopped
        return bad

    def _is_spike(self, loss: torch.Tensor, grad_norm: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
        if self.spikes is None:
            return torch.zeros_like(bad)
        total = self.layout.sum_over_shares(self.accelerator, loss)
        return self.spikes.sees_spike(total, grad_norm, bad=bad)

    def _over_processes(self, numbers: list[int]) -> torch.Tensor:
        """Sum whole numbers over all processes, without making the host wait for a GPU."""
        totals = on_device({"totals": torch.tensor(numbers)}, self.accelerator.device)["totals"]
        return self.layout.sum_over_shares(self.accelerator, totals)

    def _backward(self, micro_batches: Sequence[Batch], counts: list[int], total: torch.Tensor) -> list[torch.Tensor]:
        losses = []
        for number, (batch, own_items) in enumerate(zip(micro_batches, counts, strict=True), start=1):
            last = number == len(micro_batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self.loss(batch, own_items, total)
                # Gradients are averaged over processes, so the sum needs the factor.  A loss that is not sound makes
                # it nan, and with it every gradient on every process: all come to the same decision.
                factor = self.layout.num_shares + sound_or_nan(loss)
                self.accelerator.backward(loss, gradient=factor)
            losses.append(loss.detach())
        return losses

    def _clip(self) -> torch.Tensor:
        parameters = [parameter for parameter in self.optimizer.parameters if parameter.grad is not None]
        norm = gradient_norm(parameter.grad for parameter in parameters)
        # On a GPU the host would have to wait for the norm in order to see whether there is anything to clip.
        if self.max_grad_norm and not (norm.device.type == "cpu" and norm <= self.max_grad_norm):
            for group in by_mesh(parameters):
                torch.nn.utils.clip_grads_with_norm_(group, self.max_grad_norm, norm)
        return norm

    def _apply(
        self, bad: torch.Tensor, losses: Sequence[torch.Tensor], *, spiked: torch.Tensor
    ) -> torch.Tensor | bool:
        """Step the optimizer unless `bad`; return whether the step counts as rejected."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            # fp16: an overflow of gradients is the scaler's business, until its scale is below 1; losses are unscaled.
            if not spiked:
                scaler.step(self.optimizer)
            scaler.update()
            if spiked:
                return True
            unsound = torch.stack([sound_or_nan(loss).isnan() for loss in losses]).any()
            return bool(bad) and (scaler.get_scale() < 1 or bool(self._over_processes([int(unsound)])))
        if self.skips_on_device:
            self.optimizer.skip_if(bad.float())
            self.optimizer.step()
            return bad
        if bad:
            return True
        self.optimizer.step()
        return False
