"""A rehearsal: how long a step takes, measured by one without an update."""

import time

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from .protocols import TrainBatches
from .tbptt import check_carries
from .updates import Losses, LossSum


def seconds_per_step(model: PreTrainedModel, batches: TrainBatches, accelerator: Accelerator, losses: Losses) -> float:
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
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize(accelerator.device)
    return time.perf_counter() - started
