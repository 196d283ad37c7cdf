"""Learning-rate schedules, as closed formulas of the step.

A factor multiplies every parameter group's `initial_lr`.  It is a function of the step alone, so a resumed run needs
no schedule state.  Steps count from 0: the factor of step s is used for the update that makes step s + 1.
"""

import math
from collections.abc import Callable

from bmtk.errors import UserError

from .arguments import SCHEDULES, LoopArguments


def schedule_factor(
    name: str, step: int, *, total: int, warmup: int, decay_fraction: float = 0.2, min_ratio: float = 0.0
) -> float:
    """Learning-rate factor in [0, 1] of optimizer step `step`, 0 <= step < total.

    All schedules warm up linearly, from 1 / (warmup + 1) at step 0 to 1 at step `warmup` (Goyal et al. 2017,
    arXiv:1706.02677, section 2.2).  With p in [0, 1] the part of the decay that is over, the rest is

    - constant: 1
    - linear:   min + (1 - min) (1 - p); to zero it is the best of many (Bergsma et al. 2025, arXiv:2502.15938)
    - cosine:   min + (1 - min) (1 + cos(pi p)) / 2 (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, no restarts)
    - wsd:      1 until the last `decay_fraction` of all steps (at most what warm-up leaves), then linear
      (warmup-stable-decay: Hu et al. 2024, arXiv:2404.06395, section 4; the linear cool-down: Hagele et al. 2024,
      arXiv:2405.18392)

    Raises: UserError if the name is unknown, or warmup does not leave a step to train.
    """
    if name not in SCHEDULES:
        raise UserError(f"schedule={name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if warmup >= total:
        raise UserError(
            f"warmup_steps={warmup} does not end within the run of {total} steps; lower it, or train longer"
        )
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    decay_steps = total - warmup
    if name == "wsd":
        decay_steps = min(decay_steps, round(decay_fraction * total))
    progress = max(0.0, 1 - (total - step) / decay_steps) if decay_steps else 0.0
    left = (1 + math.cos(math.pi * progress)) / 2 if name == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * left


def build_schedule(args: LoopArguments, total: int) -> Callable[[int], float]:
    """Return the function step -> factor of a run of `total` steps.  Errors: as `schedule_factor`."""

    def factor(step: int) -> float:
        return schedule_factor(
            args.schedule,
            step,
            total=total,
            warmup=args.warmup(total),
            decay_fraction=args.decay_fraction,
            min_ratio=args.min_lr_ratio,
        )

    factor(0)
    return factor
