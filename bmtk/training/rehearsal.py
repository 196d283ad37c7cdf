"""A rehearsal: how long would a step take?  Answered by doing one, without an update."""

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator

from .updates import LossSum


def seconds_per_step(
    model: torch.nn.Module,
    micro_batches: list[dict[str, torch.Tensor]],
    accelerator: Accelerator,
    num_items: Callable[[dict], int],
    criterion: Callable[..., torch.Tensor] | None = None,
) -> float:
    """Seconds of forward and backward over one step's micro-batches: the second of two tries, as the first warms up.

    Leaves the weights as they are and no gradients behind; the optimizer's own time is not in it.
    """
    model = model.to(accelerator.device).train()
    loss = LossSum(model, model, accelerator.device, criterion=criterion)
    one = torch.ones((), dtype=torch.int64, device=accelerator.device)
    for _ in range(2):
        started = time.perf_counter()
        for batch in micro_batches:
            with accelerator.autocast():
                value = loss(batch, int(num_items(batch)), one)
            value.backward()
        model.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
    return time.perf_counter() - started
