"""The record of a run, `run.json` and `history.jsonl`: what the report, the card and the terminal are made of.

Its texts are of unknown origin (names of data, samples, command lines), so secrets, user names in paths and control
characters are redacted when it is written, and again when it is read.
"""

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from bmtk.errors import UserError
from bmtk.files import write_json

from .formatting import is_number, plural
from .redaction import scrub, scrub_command, scrub_text

RUN_RECORD = "run.json"


@dataclass(frozen=True)
class TaskDescription:
    """What the card and the report say of a kind of model; the defaults hold where a run does not say it."""

    pipeline_tag: str | None = None
    auto_class: str = "AutoModel"
    processor_class: str | None = "AutoTokenizer"
    noun: str = "model"
    limits: str = "It was evaluated on the data named above only."
    loss_unit: str = "nats"
    main_metric: str | None = None

    @classmethod
    def of(cls, about: Mapping[str, object]) -> "TaskDescription":
        """Read the section "about" of a run; what no field can hold is passed over."""
        texts = {f.name: text for f in fields(cls) if isinstance(text := about.get(f.name), str)}
        has_no_processor = about.get("processor_class", "") is None
        return replace(cls(**texts), processor_class=None) if has_no_processor else cls(**texts)


@dataclass(frozen=True)
class ModelRecord:
    """Class, type, size and origin of a model: the section "model"."""

    class_name: str | None = None
    model_type: str | None = None
    num_parameters: float | None = None
    base_model: str | None = None  # what it was fine-tuned from
    adapter: str | None = None  # kind of adapter that was trained
    saved_as: str | None = None  # "model" or "adapter", where it could be either
    other: Mapping[str, object] = field(default_factory=dict)  # what another version of bmtk has written besides

    @classmethod
    def from_json(cls, section: Mapping[str, object]) -> "ModelRecord":
        """Read the section; a value of the wrong kind counts as none."""
        texts = {name: _text_or_none(section.get(_key(name))) for name in cls._names() if name != "num_parameters"}
        size = section.get("num_parameters")
        other = {key: value for key, value in section.items() if key not in map(_key, cls._names())}
        return cls(**texts, num_parameters=_number_or_none(size), other=other)

    def to_json(self) -> dict[str, object]:
        """The section as it stands in the file."""
        known = {_key(name): getattr(self, name) for name in self._names() if name != "saved_as" or self.saved_as}
        return {**known, **self.other}

    @classmethod
    def _names(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name != "other"]


def _key(name: str) -> str:
    return "class" if name == "class_name" else name  # a field cannot have a keyword's name


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`, in the order of the file.

    Sections that each task or device fills in its own way are mappings; what is in them may be missing.
    """

    bmtk_version: str = ""
    command: str = ""  # that repeats the run
    task: str = ""
    about: Mapping[str, object] = field(default_factory=dict)  # see TaskDescription
    data: Mapping[str, Any] = field(default_factory=dict)  # name, source, licence; sizes of each split
    config: Mapping[str, Any] = field(default_factory=dict)  # every setting of the run
    environment: Mapping[str, Any] = field(default_factory=dict)  # see `environment_record`
    recipe: str = ""
    started_at: str = ""
    train_seconds: float | None = None  # without evaluations and checkpoints
    model: ModelRecord = field(default_factory=ModelRecord)
    throughput: Mapping[str, Any] = field(default_factory=dict)  # "<units>_per_second" of training, "mfu"
    metrics: Mapping[str, Any] = field(default_factory=dict)  # "<split>/<metric>"
    samples: list[dict[str, str]] = field(default_factory=list)  # "prompt", "text"; "png_base64" of an image
    inference: Mapping[str, Any] = field(default_factory=dict)  # speed over the test rows
    figures: list[dict[str, Any]] = field(default_factory=list)  # "title", and "svg" or "png_base64"
    license: str = ""  # of the model
    language: list[str] = field(default_factory=list)  # of the model: ISO codes

    @classmethod
    def read(cls, directory: str | Path) -> "RunRecord":
        """Read `run.json` of a run folder, redacted; whatever else it holds, sections have the kinds named above.

        Raises: FileNotFoundError, or UserError for a file that is not a JSON object.
        """
        path = Path(directory) / RUN_RECORD
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; give the output folder of a training run, which holds {RUN_RECORD}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore it or run the recipe again") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a JSON {type(content).__name__}, not an object; run the recipe again")
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "RunRecord":
        """Read the content of a `run.json` of any version or origin, redacted."""
        figures, samples = content.get("figures"), content.get("samples")  # pictures: never text, so not scrubbed
        run = scrub({key: value for key, value in content.items() if key not in ("figures", "samples")})
        languages = run.get("language") if isinstance(run.get("language"), list) else []
        texts = ("bmtk_version", "recipe", "started_at", "license")
        sections = ("about", "data", "config", "environment", "throughput", "metrics", "inference")
        plain: dict[str, Any] = {name: str(run.get(name) or "") for name in texts}
        plain |= {name: _section(run, name) for name in sections}
        return cls(
            task=str(run.get("task")),
            command=scrub_command(str(run.get("command") or "")),
            train_seconds=_number_or_none(run.get("train_seconds")),
            model=ModelRecord.from_json(_section(run, "model")),
            language=[str(code) for code in languages],
            samples=_samples(samples) if isinstance(samples, list) else [],
            figures=[figure for figure in figures if isinstance(figure, dict)] if isinstance(figures, list) else [],
            **plain,
        )

    def write(self, directory: str | Path) -> Path:
        """Write `run.json` into a run folder, redacted, and return its path."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content = {key: value for key, value in content.items() if key not in ("license", "language") or value}
        figures, samples = content.pop("figures"), _samples(self.samples)  # with pictures of our own making
        content["model"] = self.model.to_json()
        redacted = scrub(json.loads(json.dumps(content, default=str)))
        redacted |= {"command": scrub_command(self.command), "samples": samples, "figures": figures}
        path = Path(directory) / RUN_RECORD
        write_json(path, {f.name: redacted[f.name] for f in fields(self) if f.name in redacted})
        return path

    @property
    def description(self) -> TaskDescription:
        """What kind of model it is, in words."""
        return TaskDescription.of(self.about)

    @property
    def data_name(self) -> str | None:
        name = self.data.get("name")
        return str(name) if name else None

    @property
    def hardware(self) -> str | None:
        name = self.environment.get("hardware")
        return str(name) if name else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of the training, between 0 and 1."""
        return _number_or_none(self.throughput.get("mfu"))


def _samples(samples: list[Any]) -> list[dict[str, str]]:
    """The samples with their texts redacted; a picture is kept as it is."""
    found = []
    for sample in samples:
        if isinstance(sample, dict):
            texts = {key: scrub_text(str(sample.get(key) or "")) for key in ("prompt", "text")}
            found.append(texts | ({"png_base64": sample["png_base64"]} if "png_base64" in sample else {}))
    return found


def _section(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    return run[name] if isinstance(run.get(name), dict) else {}


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number_or_none(value: Any) -> float | None:
    return value if is_number(value) else None


def read_history(directory: str | Path) -> Iterator[dict[str, Any]]:
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


# What this process can say of a run ---------------------------------------------------------------------------------


class Launch(Protocol):
    """What is read of an Accelerator."""

    @property
    def num_processes(self) -> int: ...

    @property
    def mixed_precision(self) -> str: ...


def environment_record(accelerator: Launch) -> dict[str, object]:
    """Versions, hardware and launch shape of this process."""
    libraries = {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
    return {
        "python": platform.python_version(),
        **libraries,
        "bmtk": bmtk_version(),
        "hardware": hardware(),
        "num_processes": accelerator.num_processes,
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
    }


def bmtk_version() -> str:
    return version("big-model-toolkit")


def hardware() -> str:
    """The device that trains, as a person would name it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    return f"{cores} CPU {plural('cores', cores)}" + (f", {threads} of them used" if threads < cores else "")


def model_record(
    model: Any, *, base_model: str | None = None, adapter: str | None = None, saved_as: str | None = None
) -> ModelRecord:
    """Class, type and size of a model."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return ModelRecord(
        class_name=names[2] if "FSDPModule" in names[:2] else names[0],  # of sharded weights, before they were
        model_type=model.config.model_type,
        num_parameters=model.num_parameters(),  # counts the weights that quantisation packs, too
        base_model=base_model,
        adapter=adapter,
        saved_as=saved_as,
    )


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
