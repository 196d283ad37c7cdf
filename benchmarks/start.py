"""How long a command takes to answer, and to its first optimizer step, beside a bare `import torch, transformers`.

    python benchmarks/start.py                        # table; start.json beside it with --output
    python benchmarks/start.py --rounds 9 --only help import

The commands take turns, each in a process of its own; shown are medians of processor and wall seconds, and in brackets
the least and the most.  A step is seen in history.jsonl.  One round before the others fills caches and prepares data.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("pretrain", "finetune", "evaluate", "predict")
BARE = "import torch, transformers"
Run = tuple[float, float]  # processor and wall seconds


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def recipe(name: str, *words: str) -> list[str]:
    return python(str(ROOT / "recipes" / f"{name}.py"), *words)


def to_the_end(command: Sequence[str]) -> Run:
    """Of a command that ends by itself."""
    return timed(command, lambda child: child.wait() is not None)


def to_first_line(command: Sequence[str]) -> Run:
    """Until a line is written, to stdout or stderr."""
    return timed(command, lambda child: bool(child.stdout and child.stdout.readline()))


def to_first_step(command: Sequence[str], folder: Path) -> Run:
    """Until the first line of history.jsonl; what the former round left of the run, but for its data, is deleted."""
    for kept in [path for path in folder.glob("*") if path.name not in ("corpus", "tokenizer")]:
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    history = folder / "history.jsonl"

    def is_there(child: subprocess.Popen[bytes]) -> bool:
        while child.poll() is None and not (history.is_file() and history.stat().st_size):
            time.sleep(0.005)
        return history.is_file()

    return timed(command, is_there)


def timed(command: Sequence[str], is_reached: Callable[[subprocess.Popen[bytes]], bool]) -> Run:
    """Seconds from the start of `command` until `is_reached` returns; the process is then ended."""
    before, started = os.times(), time.perf_counter()
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
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, wall


def works(folder: Path) -> dict[str, Callable[[], Run]]:
    """What is measured, by name."""
    end = {
        BARE: python("-c", BARE),
        "import bmtk": python("-c", "import bmtk"),
        **{f"{name} --help": recipe(name, "--help") for name in RECIPES},
        "finetune --help all": recipe("finetune", "--help", "all"),
        "bmtk finetune --help": python(str(ROOT / "bmtk_cli.py"), "finetune", "--help"),
        **{f"{name}, a mistyped option": recipe(name, "--learning_rat", "1") for name in RECIPES[:2]},
    }
    found: dict[str, Callable[[], Run]] = {name: lambda words=words: to_the_end(words) for name, words in end.items()}
    for name in RECIPES[:2]:
        out = folder / name
        words = recipe(name, "--preset", "smoke", "--output_dir", str(out))
        found[f"{name} --dry_run, first line"] = lambda words=words: to_first_line([*words, "--dry_run"])
        steps = [*words, "--logging_steps", "1"]
        found[f"{name}, first step"] = lambda steps=steps, out=out: to_first_step(steps, out)
    return found


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--only", nargs="*", help="works whose name has one of these words; default: all")
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    args = parser.parse_args(argv)
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = works(Path(folder))
        if args.only:
            chosen = {name: run for name, run in chosen.items() if any(word in name for word in args.only)}
        for round_number in range(args.rounds + 1):
            for name, run in chosen.items():
                seconds = run()
                if round_number:
                    runs.setdefault(name, []).append(seconds)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.rounds} rounds\n")
    print(f"{'':32}{'processor seconds':24}wall seconds")
    for name, pairs in runs.items():
        processor, wall = zip(*pairs, strict=True)
        print(f"{name:32}{shown(processor):24}{shown(wall)}")
    if args.output:
        args.output.write_text(json.dumps({"cores": os.cpu_count(), "seconds": runs}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
