"""`bmtk verify parallel`: a user's own run on one process, on two, and sharded over two, compared step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .recipe_runs import Log, Recipe, Scratch, Watch, last_lines, log_of, run_child, scratch_folder
from .run_difference import Bounds, Comparison, compare
from .table import aligned

# Sums of another order: 1e-7 to 1e-5 in a loss (Muon's products in bfloat16 have the most).  AdamW divides by
# gradients, so weights whose gradient is nearly 0 go apart by about the learning rate.
BOUNDS = Bounds(loss=1e-4, grad_norm=1e-3, weights=1e-3)
ROW = ("processes", "seconds", "loss", "gradient norm", "weights", "verdict")
DRAWS = ("dropout", "drop_path", "weight_drop", "drop_rate")  # in the names of settings that draw random numbers


@dataclass(frozen=True)
class Leg:
    """One way to run the recipe."""

    name: str
    folder: Path
    processes: int
    options: dict[str, object] = field(default_factory=dict)


def verify_parallel(recipe: Recipe, *, steps: int, work_dir: str | None, log: Log) -> int:
    """Say whether `recipe`, cut to `steps`, learns the same on 1 and 2 processes; the exit code.

    0 if losses, gradient norms and final weights are within `BOUNDS`; 1 with the first difference that is not, or if
    a process fails.
    """
    with scratch_folder(recipe.output_dir, work_dir, purpose="verify") as scratch:
        code = _compare_legs(recipe, scratch, steps, log)
        scratch.is_kept |= code != 0
        if scratch.is_kept:
            log(f"the runs are kept in {scratch.folder}; delete it when you have looked at them")
    return code


def _compare_legs(recipe: Recipe, scratch: Scratch, steps: int, log: Log) -> int:
    on_cpu = torch.cuda.device_count() < 2
    changes, notes = common_settings(recipe, on_cpu=on_cpu)
    legs = [Leg("1", scratch.folder / "one", 1), Leg("2", scratch.folder / "two", 2)]
    if "fsdp_size" in recipe.settings:
        legs.append(Leg("2, sharded", scratch.folder / "sharded", 2, {"fsdp_size": 2}))
    else:
        notes.append(f"sharded over two processes: skipped, as recipes/{recipe.name}.py has no fsdp_size")
    log(introduction(recipe, steps, notes, folder=scratch.folder, on_cpu=on_cpu))
    rows: list[Sequence[str]] = []
    found: list[Comparison] = []
    for leg in legs:
        log(f"  {leg.name} process{'es' if leg.processes > 1 else ''} ...")
        argv = recipe.shortened(leg.folder, steps=steps, **changes, **leg.options)
        command = recipe.command(argv, processes=leg.processes)
        watch = run_child(command, leg.folder, steps=steps, log=log, on_cpu=on_cpu)
        if watch.code:
            log(f"FAILED with exit code {watch.code}:\n{last_lines(leg.folder)}\nsee {log_of(leg.folder)}")
            return 1
        if leg is legs[0]:
            log(f"    {watch.seconds:.0f} s; the others are expected to take about {2 * watch.seconds:.0f} s each")
            rows.append((leg.name, f"{watch.seconds:.1f}", "-", "-", "-", "-"))
            continue
        found.append(compare(legs[0].folder, leg.folder, BOUNDS))
        rows.append(row(leg, watch, found[-1]))
    log(f"\n{aligned(ROW, rows)}\n(largest relative difference to one process, over {found[0].num_steps} steps)\n")
    log(verdict(legs[1:], found))
    return 1 if any(comparison.first for comparison in found) else 0


def common_settings(recipe: Recipe, *, on_cpu: bool) -> tuple[dict[str, object], list[str]]:
    """What every leg is given besides, and why, in sentences."""
    settings, notes = recipe.settings, ["precision fp32", "no evaluations or checkpoints on the way"]
    changes: dict[str, object] = {"precision": "fp32", "save_steps": 0, "eval_steps": 0, "early_stopping_patience": 0}
    if not recipe.is_pretraining:
        changes |= {"load_best_model_at_end": False, "use_cpu": on_cpu}
    size = rows_per_step(recipe)
    changes |= {"batch_size": size + size % 2, "micro_batch_size": (size + size % 2) // 2}
    notes.append(f"{size + size % 2} rows per step, in micro-batches of half of them")
    drawn = sorted(
        name
        for name in recipe.architecture | {"lora_dropout"} & settings.keys()
        if any(part in name for part in DRAWS)
    )
    changes |= dict.fromkeys(drawn, 0)
    if drawn:
        notes.append(f"{', '.join(drawn)} are 0, because random numbers depend on the number of processes")
    return changes, notes


def rows_per_step(recipe: Recipe) -> int:
    """The rows of an optimizer step, over all processes."""
    settings = recipe.settings
    if settings["batch_size"]:
        return int(settings["batch_size"])
    return int(settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"])


def introduction(recipe: Recipe, steps: int, notes: list[str], *, folder: Path, on_cpu: bool) -> str:
    device = "on the CPU (gloo), as there are not two GPUs" if on_cpu else "on GPUs"
    lines = [f"recipes/{recipe.name}.py with your settings, but {steps} steps, {device}, in {folder}:"]
    return "\n".join([*lines, *(f"- {note}" for note in notes)])


def row(leg: Leg, watch: Watch, found: Comparison) -> Sequence[str]:
    figures = (f"{value:.1e}" for value in (found.loss, found.grad_norm, found.weights))
    return (leg.name, f"{watch.seconds:.1f}", *figures, "different" if found.first else "the same")


def verdict(legs: Sequence[Leg], found: Sequence[Comparison]) -> str:
    """What was found, and what to do next."""
    bounds = f"loss {BOUNDS.loss:.0e}, gradient norm {BOUNDS.grad_norm:.0e}, weights {BOUNDS.weights:.0e}"
    wrong = [
        f"DIFFERENT on {leg.name} processes: the first difference is at {comparison.first}"
        for leg, comparison in zip(legs, found, strict=True)
        if comparison.first
    ]
    if any(comparison.left_out for comparison in found):
        wrong.append("statistics of BatchNorm were left out: each process has its own, from its own rows")
    if any(comparison.first for comparison in found):
        return "\n".join([*wrong, "next: compare history.jsonl of the folders below step by step"])
    same = f"THE SAME on any of these numbers of processes, within relative bounds ({bounds})"
    return "\n".join([same, *wrong, "next: `bmtk verify resume` kills and resumes this run"])
