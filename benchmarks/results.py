"""The table of results, from the run.json that every run leaves: runs that differ in their seed only are one row.

    python benchmarks/results.py                     # all runs in outputs/
    python benchmarks/results.py outputs/trec* other/folder

A row says what was measured, on the test rows if there are any, and says so if there are none.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from bmtk.hub.formatting import (
    escape_markdown,
    format_compact,
    format_number,
    format_seconds,
    is_number,
    is_quality,
    split_metric,
)
from bmtk.hub.run_record import RunRecord

SAME = frozenset(("seed", "output_dir", "overwrite_output_dir", "corpus_dir"))  # may differ within a row
SHOWN = 3  # metrics of a row
COLUMNS = ("task", "data", "model", "parameters", "seeds", "split", "result", "training time", "rows/s", "hardware")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs; default: all in outputs/")
    folders = parser.parse_args(argv).folders or sorted(Path("outputs").glob("*"))
    runs = [RunRecord.read(folder) for folder in folders if (folder / "run.json").is_file()]
    if not runs:
        raise SystemExit("no run.json in these folders; run a recipe first, or name the folders of finished runs")
    rows = sorted(filter(None, map(row_of, grouped(runs))))
    if not rows:
        raise SystemExit(f"none of these {len(runs)} runs has measured anything; run recipes/evaluate.py")
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def grouped(runs: list[RunRecord]) -> list[list[RunRecord]]:
    """Runs with the same settings but for the seed."""
    groups = defaultdict(list)
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in SAME}
        groups[json.dumps([run.task, settings], sort_keys=True, default=str)].append(run)
    return list(groups.values())


def row_of(runs: list[RunRecord]) -> list[str] | None:
    """One line of the table, of the newest run of each seed; None for runs that measured nothing."""
    newest = {seed_of(run): run for run in sorted(runs, key=lambda run: run.started_at)}
    measured = {split: [run for run in newest.values() if metrics_of(run, split)] for split in ("test", "validation")}
    split = next((split for split, found in measured.items() if found), None)
    if split is None:
        return None
    runs = sorted(measured[split], key=lambda run: (len(seed_of(run)), seed_of(run)))
    run, values = runs[0], [metrics_of(run, split) for run in runs]
    seconds = [run.train_seconds for run in runs if run.train_seconds]
    speeds = [speed for run in runs if (speed := run.inference.get("rows_per_second"))]
    base, size = run.model.base_model, run.model.num_parameters
    return [
        run.task,
        escape_markdown(run.data.get("name")),
        f"{run.model.class_name}{f' from {base}' if base else ''}",
        format_compact(size) if size else "",
        ", ".join(map(seed_of, runs)),
        split,
        "; ".join(f"{name.replace('_', ' ')} {spread(values, name)}" for name in best_first(run, values)),
        format_seconds(statistics.mean(seconds)) if seconds else "",
        format_number(statistics.mean(speeds)) if speeds else "",
        ", ".join(str(run.environment.get(key, "")) for key in ("hardware", "precision")),
    ]


def seed_of(run: RunRecord) -> str:
    return str(run.config.get("seed", 42))


def metrics_of(run: RunRecord, split: str) -> dict[str, float]:
    """What was measured on a split, by the metric's own name."""
    named = {split_metric(key): value for key, value in run.metrics.items() if is_quality(key) and is_number(value)}
    return {name: value for (of, name), value in named.items() if of == split}


def best_first(run: RunRecord, values: list[dict[str, float]]) -> list[str]:
    """The metrics of some of the runs, the main one of the first run first and the loss last."""
    main = run.about.get("main_metric")
    names = dict.fromkeys(name for of_run in values for name in of_run)
    return sorted(names, key=lambda name: (name != main, name == "loss"))[:SHOWN]


def spread(values: list[dict[str, float]], name: str) -> str:
    """A metric of one run, or mean and standard deviation of several; it is said if some runs lack it."""
    found = [of_run[name] for of_run in values if name in of_run]
    lacking = f" ({len(found)} of {len(values)} runs)" if len(found) < len(values) else ""
    deviation = f" ± {format_number(statistics.stdev(found))}" if len(found) > 1 else ""
    return f"{format_number(statistics.mean(found))}{deviation}{lacking}"


if __name__ == "__main__":
    main(sys.argv[1:])
