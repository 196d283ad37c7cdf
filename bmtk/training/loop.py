"""The training loop: batches become a trained model, exactly, on any number of devices.

It knows no task: it sees a model whose loss is a sum divided by a count, batches that are a function of the step, an
optimizer, a schedule and an accelerator.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from accelerate import Accelerator

from .allocation import keep_freed_memory
from .arguments import AUTO, LoopArguments
from .checkpoint import TrainState
from .disk_space import check_room_together
from .ending import ending_together
from .gradients import gradient_rules
from .micro_batches import MicroBatches, rehearse, step_within_memory
from .prepared import Prepared
from .progress import Bar
from .protocols import TrainBatches
from .rollback import data_step
from .run_log import Hooks, RunLog
from .signals import StopRequest, deferred_signals, stopped
from .spikes import SpikeDetector
from .tbptt import TBPTTState, tbptt_state
from .throughput import Meter
from .updates import Losses, Update, Updater


def train(
    prepared: Prepared,
    batches: TrainBatches,
    losses: Losses,
    schedule: Callable[[int], float],
    *,
    args: LoopArguments,
    state: TrainState,
    hooks: Hooks = Hooks(),  # noqa: B008 - frozen
    meter: Meter | None = None,
) -> TrainState:
    """Train `prepared.model` from `state.step` to the end of the run, and return `state`, which is changed in place.

    `schedule(step)` multiplies the learning rates of optimizer step `step`, counted from 0.
    Where the optimizer keeps an average of the weights, the model has it in evaluations, and when this returns.

    Raises: FloatingPointError when a step is not finite and args.nonfinite is "stop", after the weights before it are
    saved; Diverged, one of them, when no step can be applied any more; Stopped after a signal or args.max_minutes,
    when the step is finished and saved.
    """
    optimizer, accelerator = prepared.optimizer, prepared.accelerator
    keep_freed_memory(accelerator.device)
    total = args.num_train_steps if args.num_train_steps != -1 else args.total_steps(batches.steps_per_epoch)
    state.recurrent = tbptt_state(batches, state.recurrent)
    updater = _updater(prepared, batches, losses, args, total=total, recurrent=state.recurrent)
    hooks = _averaged(hooks, prepared)
    run = RunLog(accelerator, args, state, total=total, meter=meter or Meter(), hooks=hooks, detector=updater.spikes)
    run.bad_steps.batches = batches
    if hooks.save:
        check_room_together(prepared, args, step=state.step, total=total)
    run.begin()
    sizes = _sizes(prepared, batches, args, hooks)
    if state.step < total:
        rehearse(updater, batches, sizes, data_step(state.step, state.left_out), state.step)
    prepared.model.train()
    updater.before_update = hooks.saver.wait_for_copy
    with (
        _stopping(args, accelerator, hooks) as request,
        run.bar() as bar,
        run.all_saved(),
        run.named_steps(),
        ending_together(accelerator),
    ):
        vote = StopVote(request, accelerator)
        if state.step:
            run.evaluate_if_due()  # the run may have been stopped before it came to this
        for step in run.steps():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step)
            data = data_step(step, state.left_out)
            update = step_within_memory(updater, batches, sizes, data, step, request=request)
            if run.add(update):
                bar.update()
                _after_step(run, update, vote, bar, learning_rate=optimizer.param_groups[0]["lr"])
            else:
                bar.update(state.step - bar.n)
    if optimizer.average:
        optimizer.average.apply()
    run.load_best()
    return state


def _stopping(args: LoopArguments, accelerator: Accelerator, hooks: Hooks) -> AbstractContextManager[StopRequest]:
    """What the run is asked to stop by; a second Ctrl-C stops one process at once."""
    return deferred_signals(
        second_stops_at_once=accelerator.num_processes == 1,
        max_minutes=args.max_minutes,
        save_failed=lambda: hooks.saver.has_failed,
    )


class StopVote:
    """Whether the run ends after a step because a process was asked to stop; all processes come to the same answer."""

    def __init__(self, request: StopRequest, accelerator: Accelerator):
        self.request, self.accelerator = request, accelerator
        self.former: torch.Tensor | None = None

    def says_stop(self, update: Update) -> bool:
        """On several GPUs it is the vote of the step before, which is there without waiting for this step's work."""
        if self.accelerator.num_processes == 1:
            return bool(self.request)
        if self.accelerator.device.type == "cpu":
            return bool(update.stop_requests)
        former, self.former = self.former, update.stop_requests
        return former is not None and bool(former)


def _after_step(run: RunLog, update: Update, vote: StopVote, bar: Bar, *, learning_rate: float) -> None:
    """Log, stop, evaluate and save, where it is due after a step that was added to the run."""
    if run.is_due(run.args.logging_steps):
        bar.set_postfix_str(run.log(learning_rate), refresh=False)
    if vote.says_stop(update):
        run.save()
        run.hooks.saver.finish()
        raise stopped(vote.request, run.state.step, run.total, saved=run.hooks.save is not None)
    run.evaluate_if_due()
    if run.must_save:
        run.save()


def _updater(
    prepared: Prepared,
    batches: TrainBatches,
    losses: Losses,
    args: LoopArguments,
    *,
    total: int,
    recurrent: TBPTTState | None,
) -> Updater:
    steps_per_epoch = batches.steps_per_epoch if args.unfreeze_epochs else 0.0
    rules = gradient_rules(prepared.unwrapped, args, steps_per_epoch=steps_per_epoch, total=total)
    stops = args.nonfinite == "stop"
    norm = args.max_grad_norm
    updater = Updater(prepared, losses, max_grad_norm=norm, gradient_rules=rules, recurrent=recurrent, stops=stops)
    if args.spike_sigma:
        updater.spikes = SpikeDetector(args.spike_sigma, prepared.accelerator.device)
    return updater


def _sizes(prepared: Prepared, batches: TrainBatches, args: LoopArguments, hooks: Hooks) -> MicroBatches:
    """The sizes of micro-batches that the run has had; `auto` has cut the batches already."""
    accelerator, check = prepared.accelerator, hooks.check_micro_batches
    sizes = MicroBatches(args.output_dir, accelerator, check, rows=batches.micro_batch_size)
    if args.micro_batch_size == AUTO and not sizes.limits:
        sizes.limit(0, batches.micro_batch_size, is_writer=accelerator.is_main_process)
    return sizes


def _averaged(hooks: Hooks, prepared: Prepared) -> Hooks:
    """The hooks, with evaluations of the averaged weights where the optimizer keeps an average."""
    average = prepared.optimizer.average
    if not average or not hooks.evaluate:
        return hooks
    return replace(hooks, evaluate=average.applied()(hooks.evaluate))
