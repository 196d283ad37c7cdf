"""The picture of a table of speed: the ratio of every line with its spread, and where its target lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from benchmarks.rows import Line, spread

COLOURS = {True: "#2a7f62", False: "#c2452d", None: "#5b6b7b"}  # reached, not reached, no target
ROW_HEIGHT = 0.36  # inches


def draw(found: Mapping[str, Sequence[Line]], path: Path, *, title: str) -> None:
    """Write a picture of the lines that were measured; of lines without a peer, the value itself."""
    lines = [line for of_row in found.values() for line in of_row if line.ours][::-1]
    figure, axes = plt.subplots(figsize=(11, 1.6 + ROW_HEIGHT * max(1, len(lines))), layout="constrained")
    for place, line in enumerate(lines):
        values = line.ratios or line.ours
        middle, colour = sorted(values)[len(values) // 2], COLOURS[line.is_reached]
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(middle, place, "o", color=colour, markersize=6)
        if line.target:
            axes.plot(
                line.target.bound, place, marker=">" if line.target.is_least else "<", color="black", markersize=7
            )
        axes.annotate(
            spread(values), (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=colour
        )
    axes.axvline(1.0, color="#b8c2cc", linewidth=1, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(lines)), [label(line) for line in lines], fontsize=8)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.set_xlabel(
        "ours / peer of a turn: median (least to most; turns); triangles are targets and point to where they hold",
        fontsize=8,
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", color="#e6eaee", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label(line: Line) -> str:
    unit = line.unit if not line.peer else f"{line.unit} / {line.peer_name}"
    return f"{line.work}  [{unit}]"
