"""What is done to the gradients of a step between backward pass and clipping: frozen layers, L1 penalty."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import PreTrainedModel

from bmtk.errors import UserError

from .arguments import SharedArguments
from .layers import depths
from .optimizers import decayed_matrices
from .sharding import by_mesh, whole

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


class GradientRules(Protocol):
    """Changes the gradients of optimizer step `step` (counted from 0), which fp16 has multiplied by `scale`."""

    def __call__(self, step: int, scale: float = 1.0) -> None: ...


def gradient_rules(
    model: "PreTrainedModel | PeftModel", args: SharedArguments, *, steps_per_epoch: float, total: int
) -> GradientRules | None:
    """Gradual unfreezing and the L1 penalty, where `args` set them; None where they set neither.

    Raises: UserError if there is nothing to unfreeze.
    """
    rules: list[GradientRules] = []
    if args.unfreeze_epochs:
        rules.append(Unfreezing(model, args.unfreeze_epochs, steps_per_epoch=steps_per_epoch, total=total))
    if args.l1_penalty:
        rules.append(L1Penalty(model, args.l1_penalty))

    def apply(step: int, scale: float = 1.0) -> None:
        for rule in rules:
            rule(step, scale)

    return apply if rules else None


def gradient_norm(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """L2 norm of all gradients together; not finite if one of their numbers is not."""
    groups = by_mesh([gradient for gradient in gradients if gradient is not None])
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in groups]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


class Unfreezing:
    """Trains the head first, and one more layer from the top every `epochs`; the step alone decides what is trained.

    A frozen layer takes part in the backward pass, so that all processes wait for the same gradients; its gradient is
    then dropped, and neither norm nor optimizer nor weight decay sees it.  Its dropout and statistics stay active.
    Source: Howard & Ruder 2018, arXiv:1801.06146, section 3.3.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel", epochs: float, *, steps_per_epoch: float, total: int):
        setting = f"unfreeze_epochs={epochs:g}"
        depth = depths(model, setting=setting)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        levels = sorted({depth[parameter] for parameter in trained})
        if len(levels) < 2:
            raise UserError(f"{setting} finds nothing to unfreeze: what is trained lies in one layer; leave it out")
        steps = max(1, round(epochs * steps_per_epoch))
        self.opened_at = {parameter: levels.index(depth[parameter]) * steps for parameter in trained}
        if (last := max(self.opened_at.values())) >= total:
            logger.warning("%s opens the lowest layers after step %d, and the run ends at %d", setting, last, total)

    def __call__(self, step: int, scale: float = 1.0) -> None:
        for parameter, opened_at in self.opened_at.items():
            if step < opened_at:
                parameter.grad = None


class L1Penalty:
    """Adds the gradient of `factor` times the sum of the absolute values of the decayed matrices that get a gradient.

    Source: Tibshirani 1996, "Regression shrinkage and selection via the lasso".  The logged loss is without it.
    """

    def __init__(self, model: "PreTrainedModel | PeftModel", factor: float):
        self.matrices, self.factor = decayed_matrices(model), factor

    @torch.no_grad()
    def __call__(self, step: int, scale: float = 1.0) -> None:
        for matrix in self.matrices:
            if matrix.grad is not None:
                matrix.grad.add_(matrix.sign(), alpha=self.factor * scale)
