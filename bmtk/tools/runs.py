"""`bmtk runs`: the training runs below a folder, with how far they are and whether they are well.

Nothing of a run is written, and no library is imported that takes seconds.
"""

import json
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmtk.errors import UserError
from bmtk.files import PARTIAL, read_json
from bmtk.hub.formatting import LOWER_IS_BETTER, is_number
from bmtk.training.early_stopping import is_better
from bmtk.training.history import History
from bmtk.training.manifest import damages
from bmtk.training.resume import checkpoints_of, step_of
from bmtk.training.run_folder import CHECKPOINTS, LOCK, RUN_CONFIG

from .table import aligned, shown_bytes

HEADER = ("run", "recipe", "task", "model", "steps", "state", "loss", "validation", "best", "checkpoints", "health")
MADE_BY_A_RUN = (CHECKPOINTS, "corpus")  # folders in which no other run is looked for


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by the sizes that its manifest lists."""

    step: int
    bytes: int
    damages: list[str]


@dataclass(frozen=True)
class Run:
    """What the folder of a run says about it; None where it does not."""

    folder: str
    recipe: str
    task: str | None
    model: str | None
    step: int  # of the last line of the history, or of the newest checkpoint
    num_steps: int | None
    state: str  # finished, interrupted, "running (process 7)"
    loss: float | None  # of training, the last one
    validation_loss: float | None
    main_metric: str
    best: float | None  # of the main metric on validation rows
    best_step: int | None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    health: list[str] = field(default_factory=list)  # what is not as it should be


def runs_below(folder: str | Path) -> list[Run]:
    """The runs in `folder` and below it, sorted by path.  Raises: UserError if there is no such folder."""
    if not Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a folder; give one that holds output folders of runs")
    return [read_run(path) for path in _run_folders(Path(folder))]


def _run_folders(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # links are followed, and may lead in a circle
    for directory, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:
            below.clear()
            continue
        seen.add(real)
        is_run = RUN_CONFIG in names
        below[:] = sorted(
            name for name in below if not name.startswith(".") and not (is_run and name in MADE_BY_A_RUN)
        )
        if is_run:
            yield Path(directory)


def read_run(folder: Path) -> Run:
    """The run in a folder with a run_config.json."""
    config, record = (_object(folder / name) for name in (RUN_CONFIG, "run.json"))
    history = [line for line in History(folder).read() if isinstance(line, dict)]
    checkpoints = [_checkpoint(path) for path in checkpoints_of(folder)]
    step = max([0, *(int(line.get("step", 0)) for line in history), *(one.step for one in checkpoints)])
    state = _state(folder, record)
    metric = str(record.get("about", {}).get("main_metric") or "loss")
    best = _best(history, f"validation/{metric}")
    return Run(
        folder=str(folder),
        recipe=str(record.get("recipe") or ("pretrain" if "nonfinite" in config else "finetune")),
        task=config.get("task"),
        model=config.get("model") or config.get("preset_model") or config.get("model_type"),
        step=step,
        num_steps=step if state == "finished" else _num_steps(folder, config),
        state=state,
        loss=_last(history, "loss"),
        validation_loss=_last(history, "validation/loss"),
        main_metric=metric,
        best=best[0] if best else None,
        best_step=best[1] if best else None,
        checkpoints=checkpoints,
        health=[*_damaged(checkpoints), *_broken_steps(folder, history), *_leftovers(folder, state)],
    )


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def _checkpoint(folder: Path) -> Checkpoint:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Checkpoint(step_of(folder), size, damages(folder, contents=False))


def _num_steps(folder: Path, config: dict[str, Any]) -> int | None:
    """The steps that the run is to have; None where they follow from rows, and no checkpoint of Trainer has them."""
    given = next((config[key] for key in ("num_train_steps", "max_steps") if (config.get(key) or -1) > 0), None)
    states = (_object(path / "trainer_state.json").get("max_steps") for path in checkpoints_of(folder))
    return given or next((steps for steps in states if steps), None)


def _state(folder: Path, record: dict[str, Any]) -> str:
    """Whether the run has ended; the lock of a run names its process, and is empty after an orderly end."""
    words = _text(folder / LOCK).split()
    if len(words) == 4 and words[1].isdecimal():  # "process 7 on host"
        if words[3] != socket.gethostname():
            return f"finished or running on {words[3]}" if record else f"interrupted or running on {words[3]}"
        if _is_alive(int(words[1])):
            return f"running (process {words[1]})"
    return "finished" if record and any(folder.glob("*.safetensors")) else "interrupted"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((line[key] for line in reversed(history) if is_number(line.get(key))), None)


def _best(history: list[dict[str, Any]], key: str) -> tuple[float, int] | None:
    """The best value of a metric, and the first step that had it."""
    best: tuple[float, int] | None = None
    lower = bool(LOWER_IS_BETTER.fullmatch(key.rpartition("/")[2]))
    for line in history:
        value = line.get(key)
        if is_number(value) and is_better(value, best[0] if best else None, lower=lower):
            best = value, int(line["step"])
    return best


def _damaged(checkpoints: list[Checkpoint]) -> Iterator[str]:
    for checkpoint in checkpoints:
        if checkpoint.damages:
            yield f"checkpoint of step {checkpoint.step} is damaged: {checkpoint.damages[0]}"


def _broken_steps(folder: Path, history: list[dict[str, Any]]) -> Iterator[str]:
    """Steps that were not applied, and losses that were not finite."""
    newest = next(reversed(checkpoints_of(folder)), None)
    progress = _object(newest / "training_state" / "state.json").get("progress", {}) if newest else {}
    if skipped := progress.get("skipped"):
        yield f"{len(skipped)} steps skipped, as they were not finite (the last is {skipped[-1]})"
    if overflows := _last(history, "num_overflows"):
        yield f"{overflows:.0f} steps skipped by the scaler of fp16"
    if broken := [line["step"] for line in history if "loss" in line and line["loss"] is None]:
        yield f"loss not finite at step {broken[0]}"


def _leftovers(folder: Path, state: str) -> Iterator[str]:
    if "running" not in state:
        found = [path for place in (folder, folder / CHECKPOINTS) for path in place.glob(f"{PARTIAL}*")]
        if found:
            yield f"{len(found)} unfinished left by a kill ({found[0].name}); the same command deletes them"


def as_table(runs: list[Run], *, below: str | Path) -> str:
    """One line for each run, and what to do next."""
    if not runs:
        return f"no run below {below}; `bmtk pretrain --preset smoke` makes one"
    lines = [aligned(HEADER, [_row(run, Path(below)) for run in runs])]
    if any("is damaged" in problem for run in runs for problem in run.health):
        lines.append(
            "\nnext: `bmtk checkpoint verify RUN` names every damage; a run resumes from its newest whole one"
        )
    elif interrupted := [run for run in runs if run.state == "interrupted"]:
        lines.append(f"\nnext: the command that started {interrupted[0].folder} goes on with it")
    return "\n".join(lines)


def _row(run: Run, below: Path) -> list[str]:
    saved = ", ".join(f"{checkpoint.step:,}" for checkpoint in run.checkpoints)
    size = shown_bytes(sum(checkpoint.bytes for checkpoint in run.checkpoints))
    return [
        os.path.relpath(run.folder, below) if Path(run.folder) != below else run.folder,
        run.recipe,
        run.task or "-",
        run.model or "-",
        f"{run.step:,}/{'?' if run.num_steps is None else f'{run.num_steps:,}'}",
        run.state,
        _number(run.loss),
        _number(run.validation_loss),
        f"{run.main_metric} {run.best:.4f} at {run.best_step:,}" if run.best is not None else "-",
        f"{saved} ({size})" if saved else "-",
        "; ".join(run.health) or "well",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def as_json(runs: list[Run]) -> str:
    return json.dumps([asdict(run) for run in runs], indent=2)
