"""What the terminal shows when a run ends: samples, a table of the run, where it is, and what to type next."""

from pathlib import Path

from bmtk.hub.card import read_run


def run_summary(directory: str | Path, *, next_command: str) -> str:
    """The end of a run in words, from its `run.json`."""
    run, directory = read_run(directory), Path(directory)
    samples = [f"--- sample ---\n{sample['prompt']}{sample['text']}\n" for sample in run["samples"]]
    rows = [
        *((name.replace("/", " ").replace("_", " "), value) for name, value in run["metrics"].items()),
        ("parameters", run["model"].get("num_parameters")),
        ("training minutes", run.get("train_seconds", 0.0) / 60),
        ("tokens per second", run["throughput"].get("tokens_per_second")),
        ("MFU", run["throughput"].get("mfu")),
        ("checkpoint", directory),
        ("report", directory / "report.html"),
    ]
    return "\n".join(["", *samples, text_table(rows), "", f"next: {next_command}"])


def text_table(rows: list[tuple[str, object]]) -> str:
    """Two columns; numbers with four significant digits, and without a row what is not known."""
    rows = [(name, value) for name, value in rows if value is not None]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {_shown(value)}" for name, value in rows)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
