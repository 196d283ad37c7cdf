"""What the terminal shows when a run ends: samples, a table of the run, where it is, and what to type next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .formatting import format_number, format_seconds, is_number, metric_label, speed_of
from .results import worse_than_baseline
from .run_record import RunRecord


def run_summary(directory: str | Path, *, next_command: str) -> str:
    """The end of a run in words, from its `run.json`."""
    run, directory = RunRecord.read(directory), Path(directory)
    samples = [f"--- sample ---\n{sample['prompt']}{sample['text']}\n" for sample in run.samples]
    rows = [
        *((metric_label(name), value) for name, value in run.metrics.items()),
        ("parameters", run.model.num_parameters),
        ("training time", format_seconds(run.train_seconds or 0.0)),
        *filter(None, [speed_of(run.throughput)]),
        ("MFU", f"{run.mfu:.1%}" if run.mfu is not None else None),
        ("test rows per second", run.inference.get("rows_per_second")),
        ("checkpoint", directory),
        ("report", directory / "report.html"),
    ]
    warning = [f"note: {text}\n"] if (text := worse_than_baseline(run)) else []
    return "\n".join(["", *warning, *samples, text_table(rows), "", f"next: {next_command}"])


def run_plan(
    config: dict[str, Any],
    model: Any,
    *,
    steps: int,
    epochs: float,
    per_step: int,
    unit: str,
    seconds_per_step: float,
    decided: Mapping[str, object],
) -> str:
    """The plan of a run: its resolved config, its size, and how long it would take on this machine.

    `decided` are settings to show whatever their source, by default too.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = [
        ("model", type(model).__name__),
        ("parameters", f"{model.num_parameters():,} ({trainable:,} trained)"),
        *decided.items(),
        (f"{unit} per step", per_step),
        ("steps", f"{steps:,} ({epochs:.3g} epochs)"),
        (f"{unit} in all", steps * per_step),
        ("estimated time", f"{format_seconds(steps * seconds_per_step)} ({seconds_per_step * 1e3:.0f} ms per step)"),
    ]
    config_table = text_table(list(config.items()))
    return f"config\n{config_table}\n\nplan (dry run: nothing is trained or saved)\n{text_table(rows)}"


def text_table(rows: list[tuple[str, object]]) -> str:
    """Two columns; numbers have four significant digits, and rows without a value are left out."""
    rows = [(name, value) for name, value in rows if value is not None]
    width = max(len(name) for name, _ in rows)
    shown = ((name, format_number(value) if is_number(value) else value) for name, value in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown)
