"""The facts of a run, in `run.json`: what the report and the model card are made of."""

import json
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch


def environment_facts(accelerator) -> dict[str, object]:
    """Versions, hardware and launch shape of this process."""
    libraries = {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    return {
        "python": platform.python_version(),
        **libraries,
        "bmtk": version("big-model-toolkit"),
        "hardware": hardware(),
        "num_processes": accelerator.num_processes,
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
    }


def hardware() -> str:
    """The device that trains, as a person would name it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def model_facts(model, *, base_model: str | None = None, adapter: str | None = None) -> dict[str, object]:
    """Class, type and size of a model."""
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "base_model": base_model,
        "adapter": adapter,
    }


def launch_command() -> str:
    """The command line that repeats this run."""
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join(["accelerate", "launch", str(script), *sys.argv[1:]])


def write_facts(directory: str | Path, **facts: object) -> Path:
    """Write `run.json`, beside its final place first."""
    path = Path(directory) / "run.json"
    content = {"bmtk_version": version("big-model-toolkit"), "command": launch_command(), **facts}
    beside = path.with_suffix(".json.new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    beside.replace(path)
    return path


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
