"""A rehearsal: how long would a step take?  Answered by doing one, without an update."""

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from .tbptt import check_carries
from .updates import LossSum


def seconds_per_step(
    model: torch.nn.Module,
    batches,
    accelerator: Accelerator,
    *,
    num_items: Callable[[dict], int],
    **loss: Callable,
) -> float:
    """Seconds of forward and backward over the micro-batches of the first step: of two tries, as the first warms up.

    `batches` are those of `loop.train`, `loss` is what LossSum may be told.
    Leaves the weights as they are and no gradients behind; the optimizer's own time is not in it.
    Raises: ValueError if the batches go on from a state that the model does not have.
    """
    if batches.carries_state:
        check_carries(model)
    model = model.to(accelerator.device).train()
    loss_sum = LossSum(model, model, accelerator.device, **loss)
    one = torch.ones((), dtype=torch.int64, device=accelerator.device)
    for _ in range(2):
        started = time.perf_counter()
        for batch in batches[0]:
            with accelerator.autocast():
                value = loss_sum(batch, int(num_items(batch)), one)
            value.backward()
        model.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
    return time.perf_counter() - started
