"""The training loop: batches become a trained model, exactly, on any number of devices.

It knows no task: it sees a model whose loss is a sum divided by a count, batches that are a function of the step, an
optimizer, a schedule and an accelerator.
"""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs
from transformers import PreTrainedModel

from .arguments import LoopArguments
from .averaging import WeightAverage
from .checkpoint import TrainState
from .gradients import gradient_rules
from .optimizers import NamedOptimizer, build_optimizer, multiplies_bfloat16_fast
from .run_log import RunLog
from .signals import Stopped, StopRequest, deferred_signals
from .tbptt import tbptt_state
from .throughput import Meter
from .updates import Update, Updater

logger = logging.getLogger(__name__)

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def build_accelerator(args: LoopArguments) -> Accelerator:
    """Make the accelerator of the devices that the launcher gave, with the precision that `args` ask for.

    Raises: ValueError for a way of distribution that the loop cannot save and resume yet.
    """
    precision = _natural_precision() if args.precision == "auto" else args.precision
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        dynamo_backend="inductor" if args.torch_compile else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"distributed_type={accelerator.distributed_type.value} is not supported by this loop; "
            f"choose one of {', '.join(kind.value for kind in SUPPORTED)} in the accelerate configuration"
        )
    return accelerator


def _natural_precision() -> str:
    """bf16 where the device multiplies it faster than fp32: CUDA devices and CPUs with instructions for it."""
    return "bf16" if multiplies_bfloat16_fast("cuda" if torch.cuda.is_available() else "cpu") else "fp32"


def prepare(
    model: PreTrainedModel, args: LoopArguments, accelerator: Accelerator
) -> tuple[torch.nn.Module, NamedOptimizer]:
    """Make the optimizer of `model`, and wrap the model for the devices (also compile it, if `args` say so)."""
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(model, args)
    wrapped = accelerator.prepare(model)
    if args.ema_decay:
        optimizer.average = WeightAverage(optimizer.names, args.ema_decay)
    return wrapped, optimizer


def train(  # noqa: PLR0913 - a straight list of collaborators; an object around them would only hide it
    model: torch.nn.Module,
    batches,
    optimizer: NamedOptimizer,
    schedule: Callable[[int], float],
    accelerator: Accelerator,
    *,
    args: LoopArguments,
    state: TrainState,
    num_items: Callable[[dict], int],
    num_units: Callable[[dict], int] | None = None,
    criterion: Callable[..., torch.Tensor] | None = None,
    inputs_of: Callable[[dict], dict] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    main_metric: str = "validation/loss",
    save: Callable[[TrainState], object] | None = None,
    load_best: Callable[[TrainState], object] | None = None,
    log: Callable[[dict], None] | None = None,
    meter: Meter | None = None,
) -> TrainState:
    """Train `model` from `state.step` to the end of the run, and return `state`, which is changed in place.

    batches[step] is the list of this process's micro-batches of optimizer step `step`; batches.steps_per_epoch is read
    where args count in epochs, and batches.carries_state says whether rows go on from the state of the step before.
    num_items(batch) counts the items whose losses are summed, num_units(batch) what throughput is counted in (None:
    the items); criterion(outputs, batch) sums the losses, if the model's own shall not be used, and inputs_of(batch)
    is then what the model reads.
    evaluate() and save(state) are called on every process, log(record) on the main one for each line of history.jsonl.
    Where the optimizer keeps an average of the weights, the model has it in evaluations, and when this returns.
    Early stopping goes by `main_metric` of the evaluations, and load_best(state) then gives the model what was saved
    after state.best_step.

    Raises: FloatingPointError when a step is not finite and args.nonfinite is "stop"; Stopped (exit code 130 or 143)
    after SIGINT or SIGTERM, when the step is finished and saved.
    """
    total = args.num_train_steps if args.num_train_steps != -1 else args.total_steps(batches.steps_per_epoch)
    losses = {"num_items": num_items, "num_units": num_units, "criterion": criterion, "inputs_of": inputs_of}
    rules = gradient_rules(
        accelerator.unwrap_model(model, keep_torch_compile=False),
        args,
        steps_per_epoch=batches.steps_per_epoch if args.unfreeze_epochs else 0.0,
        total=total,
    )
    norm = args.max_grad_norm
    state.recurrent = tbptt_state(batches, state.recurrent)
    settings = {"max_grad_norm": norm, "gradient_rules": rules, "recurrent": state.recurrent}
    updater = Updater(model, optimizer, accelerator, **settings, **losses)
    average = optimizer.average
    if average and evaluate:
        evaluate = average.applied()(evaluate)
    run = RunLog(accelerator, args, state, total=total, meter=meter or Meter(), main_metric=main_metric)
    run.begin()
    model.train()
    with deferred_signals(second_stops_at_once=accelerator.num_processes == 1) as request, run.bar() as bar:
        if state.step:
            run.evaluate_if_due(evaluate, log)  # the run may have been stopped before it came to this
        for step in run.steps():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step)
            update = updater.step(batches[step], step, stop_requested=request.signal_number != 0)
            run.add(update)
            bar.update()
            if run.is_due(args.logging_steps):
                bar.set_postfix_str(run.log(optimizer.param_groups[0]["lr"], log), refresh=False)
            if _must_stop(update, request, accelerator, may_wait=run.is_due(args.logging_steps)):
                run.save(save)
                raise _stopped(request, state, total, saved=save is not None)
            run.evaluate_if_due(evaluate, log)
            if run.must_save:
                run.save(save)
    if average:
        average.apply()
    if load_best and state.best_step not in (0, state.step):
        accelerator.print(f"the best of the run, {main_metric} {state.best:.6g}, was that of step {state.best_step}")
        load_best(state)
        state.metrics = dict(evaluate())
    return state


def _must_stop(update: Update, request: StopRequest, accelerator: Accelerator, *, may_wait: bool) -> bool:
    """Whether the run ends here; all processes come to the same answer, on a GPU only where they may wait for it."""
    if accelerator.num_processes == 1:
        return request.signal_number != 0
    return (may_wait or accelerator.device.type == "cpu") and bool(update.stop_requests)


def _stopped(request: StopRequest, state: TrainState, total: int, *, saved: bool) -> Stopped:
    remedy = "saved; run the same command again to resume" if saved else "nothing was saved, as this run saves nothing"
    logger.warning("stopped after step %d of %d: %s", state.step, total, remedy)
    return Stopped(request.exit_code)
