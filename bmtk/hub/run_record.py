"""The facts of a run, in `run.json` and `history.jsonl`: what the report, the card and the terminal are made of.

Their texts are of unknown origin (names of data, samples, command lines), so secrets, user names in paths and control
characters are scrubbed when they are written, and again when they are read.
"""

import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from bmtk.files import write_json

SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf_(?:oauth_|jwt_)?|api_org_|gh[opsur]_)[A-Za-z0-9]{10,}|(?:sk-|github_pat_)[\w-]{16,})",
    re.ASCII,
)
SECRET_NAME = r"(?:\w*(?:hub|hf|api|auth|access)[_-]?token|token|\w*(?:password|passwd|secret|api[_-]?key))"
SECRET_ASSIGNED = re.compile(rf"(?i)(--{SECRET_NAME}[\s=]+|\b{SECRET_NAME}=)(\"[^\"]*\"|'[^']*'|\S+)")
USER_HOME = re.compile(r"(?<![\w.~-])(?:/home/|/Users/|[A-Za-z]:\\Users\\)[^/\\\s\"']+|(?<![\w./~-])/root\b(?!-)")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
REDACTED = "[redacted]"


def environment_record(accelerator) -> dict[str, object]:
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    return f"{cores} CPU cores" + (f", {threads} of them used" if threads < cores else "")


def model_record(model, *, base_model: str | None = None, adapter: str | None = None) -> dict[str, object]:
    """Class, type and size of a model."""
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),  # counts what is packed by quantisation, too
        "base_model": base_model,
        "adapter": adapter,
    }


def launch_command() -> str:
    """The command line that repeats this run."""
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join(["accelerate", "launch", str(script), *sys.argv[1:]])


def write_run_record(directory: str | Path, **facts: object) -> Path:
    """Write `run.json`."""
    path = Path(directory) / "run.json"
    figures = facts.pop("figures", [])  # markup and pictures of our own making
    command = {"bmtk_version": version("big-model-toolkit"), "command": scrub_command(launch_command())}
    content = {**command, **scrub(json.loads(json.dumps(facts, default=str))), "figures": figures}
    write_json(path, content)
    return path


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_run(directory: str | Path) -> dict:
    """Return the scrubbed `run.json`: the sections are always dictionaries, `samples` and `figures` always lists."""
    path = Path(directory) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the output folder of a training run, which holds run.json")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or run the recipe again") from error
    if not isinstance(run, dict):
        raise ValueError(f"{path} holds a JSON {type(run).__name__}, not an object; run the recipe again")
    figures = run.pop("figures", [])  # binary or markup: never shown as text, so not scrubbed
    run = {**scrub(run), "command": scrub_command(str(run.get("command") or ""))}
    run["task"] = str(run.get("task"))
    for section in ("about", "model", "data", "config", "metrics", "throughput", "environment"):
        run[section] = run[section] if isinstance(run.get(section), dict) else {}
    samples = run["samples"] if isinstance(run.get("samples"), list) else []
    run["samples"] = [
        {key: str(sample.get(key) or "") for key in ("prompt", "text")}
        for sample in samples
        if isinstance(sample, dict)
    ]
    run["figures"] = [figure for figure in figures if isinstance(figure, dict)] if isinstance(figures, list) else []
    return run


def read_history(directory: str | Path) -> Iterator[dict]:
    """Yield the rows of `history.jsonl` that have a step; a line cut short by an interruption is passed over."""
    path = Path(directory) / "history.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), (int, float)) and math.isfinite(row["step"]):
                yield row


def scrub(value):
    """Return JSON `value` without secrets, names of users in paths, absolute working paths and control characters."""
    if isinstance(value, dict):
        is_secret = re.compile(rf"(?i){SECRET_NAME}").fullmatch
        return {
            scrub_text(key): REDACTED if is_secret(key) and isinstance(item, str) and item else scrub(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value


def scrub_command(command: str) -> str:
    """Redact what options such as --hub_token carry, besides what `scrub_text` does."""
    return SECRET_ASSIGNED.sub(rf"\1{REDACTED}", scrub_text(command))


def scrub_text(text: str) -> str:
    """Redact access tokens, shorten paths (relative to here, else to ~) and replace what cannot be printed."""
    text = UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = SECRET.sub(REDACTED, text)
    text = re.sub(r"(://)[^/\s@]+:[^/\s@]+@", rf"\1{REDACTED}@", text)
    for place, short in ((Path.cwd(), ""), (Path.home(), "~/")):
        if place != Path(place.anchor):
            inside = rf"(?<![\w.~-]){re.escape(str(place))}"
            text = re.sub(rf"{inside}(?![\w./-])", short.rstrip("/") or ".", re.sub(rf"{inside}/", short, text))
    return USER_HOME.sub("~", text)
