"""How long a command takes to answer, and to its first optimizer step, beside a bare `import torch, transformers`.

The commands take turns, each in a process of its own.  A step is seen in history.jsonl.  One round before the others
fills caches and prepares data.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.rows import ROOT, Line, Settings, at_most, row, take_turns

BARE = (sys.executable, "-c", "import torch, transformers")


@row
def start(settings: Settings) -> list[Line]:
    """--help, a mistyped option, --dry_run, the first step: CPU seconds, and wall seconds beyond a bare import."""
    answers = {f"{name} --help": recipe(name, "--help") for name in ("pretrain", "finetune", "evaluate", "predict")}
    typos = {f"{name}, a mistyped option": recipe(name, "--learning_rat", "1") for name in ("pretrain", "finetune")}
    folders = {name: settings.folder / f"start-{name}" for name in ("pretrain", "finetune")}
    plans, steps = {}, {}
    for name, folder in folders.items():
        words = recipe(name, "--preset", "smoke", "--output_dir", str(folder))
        plans[f"{name} --dry_run, first line"] = [*words, "--dry_run"]
        steps[f"{name}, first step"] = ([*words, "--logging_steps", "1"], folder)
    if settings.quick:
        answers, typos, plans, steps = dict(list(answers.items())[:1]), {}, {}, {}
    runs = {name: lambda words=words: to_the_end(words)[0] for name, words in (answers | typos).items()}
    runs |= {name: lambda words=words: to_first_line(words)[0] for name, words in plans.items()}
    runs |= {name: lambda words=words, at=at: to_first_step(words, at)[1] for name, (words, at) in steps.items()}
    found = take_turns({**runs, "bare": lambda: to_the_end(BARE)[1]}, settings.turns)
    lines = [Line(name, "CPU s", found[name], target=at_most(1.0)) for name in (*answers, *typos)]
    lines += [Line(name, "CPU s", found[name], target=at_most(3.0)) for name in plans]
    return lines + [beyond(name, found[name], found["bare"]) for name in steps]


def beyond(name: str, seconds: list[float], bare: list[float]) -> Line:
    """What a start takes beyond a bare import, in the same turn."""
    extra = [one - other for one, other in zip(seconds, bare, strict=True)]
    return Line(f"{name}, beyond a bare import", "s", extra, target=at_most(2.0))


def recipe(name: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *words]


def to_the_end(command: Sequence[str]) -> tuple[float, float]:
    """Processor and wall seconds of a command that ends by itself."""
    return clocked(command, lambda child: child.wait() is not None)


def to_first_line(command: Sequence[str]) -> tuple[float, float]:
    """Until a line is written, to stdout or stderr."""
    return clocked(command, lambda child: bool(child.stdout and child.stdout.readline()))


def to_first_step(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """Until the first line of history.jsonl; what the former round left of the run, but for its data, is deleted."""
    for kept in [path for path in folder.glob("*") if path.name not in ("corpus", "tokenizer")]:
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    history = folder / "history.jsonl"

    def is_there(child: subprocess.Popen[bytes]) -> bool:
        while child.poll() is None and not (history.is_file() and history.stat().st_size):
            time.sleep(0.005)
        return history.is_file()

    return clocked(command, is_there)


def clocked(command: Sequence[str], is_reached: Callable[[subprocess.Popen[bytes]], bool]) -> tuple[float, float]:
    """Seconds from the start of `command` until `is_reached` returns; the process is then ended."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps what it has compiled
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        if not is_reached(child):
            raise SystemExit(f"{' '.join(command)} ended with status {child.wait()} before it was measured")
        wall = time.perf_counter() - started
        child.kill()
        child.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall
