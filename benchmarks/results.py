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

from bmtk.hub.facts import read_run
from bmtk.hub.wording import format_compact, format_number, format_seconds, is_quality, split_metric
from bmtk.tasks import TASKS

SAME = frozenset(("seed", "output_dir", "overwrite_output_dir", "corpus_dir"))  # may differ within a row
SHOWN = 3  # metrics of a row
COLUMNS = ("task", "data", "model", "parameters", "seeds", "split", "result", "training time", "hardware")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs; default: all in outputs/")
    folders = parser.parse_args(argv).folders or sorted(Path("outputs").glob("*"))
    runs = [read_run(folder) for folder in folders if (folder / "run.json").is_file()]
    if not runs:
        raise SystemExit("no run.json in these folders; run a recipe first, or name the folders of finished runs")
    rows = sorted(filter(None, map(row_of, grouped(runs))))
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def grouped(runs: list[dict]) -> list[list[dict]]:
    """Runs with the same settings but for the seed."""
    groups = defaultdict(list)
    for run in runs:
        settings = {key: value for key, value in run["config"].items() if key not in SAME}
        groups[json.dumps([run["task"], settings], sort_keys=True, default=str)].append(run)
    return list(groups.values())


def row_of(runs: list[dict]) -> list[str] | None:
    """One line of the table; None for runs that measured nothing."""
    run, metrics = runs[0], runs[0]["metrics"]
    splits = {split_metric(key)[0] for key in metrics if is_quality(key)}
    split = next((name for name in ("test", "validation") if name in splits), None)
    if split is None:
        return None
    seconds = [other["train_seconds"] for other in runs if other.get("train_seconds")]
    seeds = sorted({str(other["config"].get("seed", 42)) for other in runs}, key=lambda seed: (len(seed), seed))
    size = run["model"].get("num_parameters")
    return [
        run["task"],
        str(run["data"].get("name")),
        f"{run['model'].get('class')}{' from ' + base if (base := run['model'].get('base_model')) else ''}",
        format_compact(size) if size else "",
        ", ".join(seeds),
        split,
        "; ".join(f"{name.replace('_', ' ')} {spread(runs, f'{split}/{name}')}" for name in best_first(run, split)),
        format_seconds(statistics.mean(seconds)) if seconds else "",
        ", ".join(str(run["environment"].get(key, "")) for key in ("hardware", "precision")),
    ]


def best_first(run: dict, split: str) -> list[str]:
    """The metrics of a split, the task's main one first."""
    names = [split_metric(key)[1] for key in run["metrics"] if split_metric(key)[0] == split and is_quality(key)]
    task = TASKS.get(run["task"])
    return sorted(names, key=lambda name: (task is None or name != task.main_metric, name == "loss"))[:SHOWN]


def spread(runs: list[dict], key: str) -> str:
    """A metric of one run, or mean and standard deviation of several."""
    values = [run["metrics"][key] for run in runs if key in run["metrics"]]
    if len(values) < 2:
        return format_number(values[0])
    return f"{format_number(statistics.mean(values))} ± {format_number(statistics.stdev(values))}"


if __name__ == "__main__":
    main(sys.argv[1:])
