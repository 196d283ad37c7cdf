"""What is done to the gradients of a step between backward pass and clipping: frozen layers, L1 penalty."""

import logging
from collections.abc import Callable

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .arguments import SharedArguments
from .layers import depths
from .optimizers import decayed_matrices

logger = logging.getLogger(__name__)


def gradient_rules(
    model: PreTrainedModel | PeftModel, args: SharedArguments, *, steps_per_epoch: float, total: int
) -> Callable[..., None] | None:
    """The function `(step, scale=1.0)` that does to the gradients of a step (counted from 0) what `args` ask for.

    `scale` is what fp16 has multiplied the gradients by.  None: `args` ask for nothing.
    Raises: ValueError if there is nothing to unfreeze.
    """
    rules = []
    if args.unfreeze_epochs:
        rules.append(Unfreezing(model, args.unfreeze_epochs, steps_per_epoch=steps_per_epoch, total=total))
    if args.l1_penalty:
        rules.append(L1Penalty(model, args.l1_penalty))

    def apply(step: int, scale: float = 1.0):
        for rule in rules:
            rule(step, scale)

    return apply if rules else None


class Unfreezing:
    """Trains the head first, and one more layer from the top every `epochs`; what is open is a function of the step.

    A frozen layer takes part in the backward pass, so that all processes wait for the same gradients; its gradient is
    then dropped, and neither norm nor optimizer nor weight decay knows of it.  Its dropout and statistics are at work.
    Source: Howard & Ruder 2018, arXiv:1801.06146, section 3.3.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, epochs: float, *, steps_per_epoch: float, total: int):
        asked_by = f"unfreeze_epochs={epochs:g}"
        depth = depths(model, asked_by=asked_by)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        levels = sorted({depth[parameter] for parameter in trained})
        if len(levels) < 2:
            raise ValueError(f"{asked_by} finds nothing to unfreeze: what is trained lies in one layer; leave it out")
        steps = max(1, round(epochs * steps_per_epoch))
        self.opened_at = {parameter: levels.index(depth[parameter]) * steps for parameter in trained}
        if (last := max(self.opened_at.values())) >= total:
            logger.warning("%s opens the lowest layers after step %d, and the run ends at %d", asked_by, last, total)

    def __call__(self, step: int, scale: float):
        for parameter, opened_at in self.opened_at.items():
            if step < opened_at:
                parameter.grad = None


class L1Penalty:
    """Adds the gradient of `factor` times the sum of the absolute values of the decayed matrices that get a gradient.

    Source: Tibshirani 1996, "Regression shrinkage and selection via the lasso".  The loss that is told is without it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, factor: float):
        self.matrices, self.factor = decayed_matrices(model), factor

    @torch.no_grad()
    def __call__(self, step: int, scale: float):
        for matrix in self.matrices:
            if matrix.grad is not None:
                matrix.grad.add_(matrix.sign(), alpha=self.factor * scale)
