"""Write the report of a run: one HTML page with curves, samples, results and settings that opens from disk.

The page loads nothing and runs nothing (its content security policy forbids both). Charts are drawn here: a plot is
an SVG stretched over a box of percentages, with strokes that do not scale, and its labels are HTML text at the same
percentages, so that they stay legible on a phone, on paper and in dark mode.
"""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from bmtk.files import write_text

from .card import TEMPLATES, data_rows, describe, environment_rows, procedure_rows, run_status, run_title
from .formatting import (
    format_compact,
    format_number,
    format_seconds,
    is_baseline,
    is_chosen,
    is_number,
    is_quality,
    metric_label,
    plural,
    show,
    speed_of,
    split_metric,
)
from .redaction import scrub_text
from .results import baselines, metric_rows, ranked_metrics, worse_than_baseline
from .run_record import RunRecord, read_history

MAX_DRAWN = 1200  # points of one line; a longer one is drawn by the extremes of each stretch
MAX_DOTS = 60  # points that are drawn and named one by one
NOT_A_CHART = {"loss", "perplexity", "bits_per_byte"}  # drawn first; functions of the loss


def write_report(directory: str | Path) -> Path:
    """Write `<directory>/report.html` from `run.json` and `history.jsonl` there and return its path.

    Raises: FileNotFoundError or UserError when `run.json` is missing or is not a JSON object.
    """
    run = RunRecord.read(directory)
    history = Curves(directory)
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html").render(
        run=run,
        title=run_title(run),
        title_parts=re.split(r"(?<=[a-z])(?=[A-Z])", run_title(run)),
        verdict=verdict(run, history.last_step),
        status=run_status(run, history.last_step),
        warning=worse_than_baseline(run),
        tiles=tiles(run),
        beside=beside(run),
        charts=charts(run, history),
        metrics=[row[1:] for row in metric_rows(run)],
        samples=[(sample, embed_figure(sample) if "png_base64" in sample else None) for sample in run.samples],
        figures=[figure for figure in map(embed_figure, run.figures) if figure],
        data=data_rows(run),
        model=model_rows(run),
        procedure=procedure_rows(run),
        environment=environment_rows(run),
        config=[(key, show(value)) for key, value in run.config.items() if is_chosen(key, value)],
    )
    path = Path(directory) / "report.html"
    write_text(path, text)
    return path


# ----------------------------------------------------------------------------------------------------- the words


def verdict(run: RunRecord, last_step: float | None) -> str:
    """Say in one sentence how long the model was trained, on what machine and how well it does."""
    steps = f" for {last_step:,.0f} {plural('steps', last_step)}" if last_step is not None else ""
    time = f" in {format_seconds(run.train_seconds)}" if run.train_seconds is not None else ""
    place = f" on {run.hardware}" if run.hardware else ""
    results = ", ".join(f"{label[:1].lower()}{label[1:]} {shown}" for _, label, shown in ranked_metrics(run)[:2])
    sentence = describe(run).rstrip(".") + f"{steps}{time}{place}"
    return f"{sentence}: {results}." if results else f"{sentence}."


def tiles(run: RunRecord) -> list[tuple[str, str]]:
    """Return (large figure, its name): at most three metrics of the same rows, the time and the speed."""
    ranked = [(split_metric(key)[0], shown, label) for key, label, shown in ranked_metrics(run)]
    found = [(shown, label) for split, shown, label in ranked if split == ranked[0][0]][:3]
    if run.train_seconds is not None:
        found.append((format_seconds(run.train_seconds), "Training time"))
    if speed := speed_of(run.throughput):
        found.append((format_compact(speed[1]), speed[0].capitalize()))
    return found


def beside(run: RunRecord) -> dict[str, list[tuple[str, str]]]:
    """Return (baseline in words, shown value) for the label of each metric that has baselines."""
    found = {label: baselines(run, key) for key, label, _ in ranked_metrics(run)}
    return {label: [(words, format_number(value)) for words, value in values] for label, values in found.items()}


def model_rows(run: RunRecord) -> list[tuple[str, str]]:
    """Return the model's facts as a table."""
    names = {"num_parameters": "parameters", "base_model": "base model", "model_type": "model type"}
    named = ((names.get(key, key), value) for key, value in run.model.to_json().items() if value is not None)
    return [(k, format_number(v) if is_number(v) else show(v)) for k, v in named]


def embed_figure(figure: dict[str, Any]) -> dict[str, Any] | None:
    """Return title and data URI of a figure; None when it is neither an SVG nor a PNG.

    An SVG shown as an image runs no script, loads nothing and shares no ids or styles with the page, whoever drew it.
    """
    try:
        if "svg" in figure:
            kind, content = "svg+xml", str(figure["svg"]).encode()
            valid = b"<svg" in content[:2000]
        else:
            kind, content = "png", base64.b64decode(figure["png_base64"])
            valid = content.startswith(b"\x89PNG\r\n\x1a\n")
    except (KeyError, TypeError, ValueError):
        return None
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"title": scrub_text(str(figure.get("title", "Figure"))), "source": source} if valid else None


# --------------------------------------------------------------------------------------------------- the numbers


class Curves:
    """The columns of `history.jsonl`: `history[key]` is (steps, values), in order of steps.

    A step that was logged twice (before and after a resume) counts as it was logged last.
    """

    def __init__(self, directory: str | Path):
        self.columns: dict[str, dict[float, float]] = {}
        for row in read_history(directory):
            for key, value in row.items():
                value = math.nan if value in ("NaN", "nan") else value
                if key != "step" and is_number(value):
                    self.columns.setdefault(key, {})[row["step"]] = value
        steps = [step for column in self.columns.values() for step in column]
        self.first_step, self.last_step = min(steps, default=None), max(steps, default=None)

    def __getitem__(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        steps, values = (
            zip(*sorted(self.columns.get(key, {}).items()), strict=True) if key in self.columns else ((), ())
        )
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def validation_keys(self) -> list[str]:
        """Return the columns that were measured on the validation data, except speeds."""
        return [key for key in self.columns if split_metric(key)[0] == "validation" and is_quality(key)]


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the moving average over about a twenty-fifth of the line; the window shrinks towards both ends.

    Values that are not finite are left out of their windows; a window without any finite value is NaN.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 50), index)
    first, end = index - half, np.minimum(index + half + 1, len(values))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan)


def thin(values: np.ndarray, limit: int = MAX_DRAWN) -> np.ndarray:
    """Return about `limit` indices: the lowest and the highest value of each stretch, and both ends."""
    if len(values) <= limit:
        return np.arange(len(values))
    kept = [0, len(values) - 1]
    for stretch in np.array_split(np.arange(len(values)), limit // 2):
        finite = stretch[np.isfinite(values[stretch])]
        kept += [stretch[0]] if not len(finite) else [finite[values[finite].argmin()], finite[values[finite].argmax()]]
    return np.unique(kept)


# --------------------------------------------------------------------------------------------------- the charts


@dataclass(frozen=True)
class Axis:
    """A range of values laid over 0 to 100 percent, linear or logarithmic."""

    low: float
    high: float
    log: bool = False
    whole: bool = False  # ticks at whole numbers only

    def place(self, values: np.ndarray) -> np.ndarray:
        """Return the place of each value in percent; NaN stays NaN."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return 100 * ((np.log(values) if self.log else values) - low) / (high - low)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Return (percent, label) of about `count` round values inside the range."""
        values = self.values(count)
        return list(zip(self.place(np.array(values)).tolist(), format_ticks(values, log=self.log), strict=True))

    def values(self, count: int) -> list[float]:
        """Return about `count` round values inside the range."""
        if self.log:
            return self._log_values()
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        step = max(1, round(step)) if self.whole else step
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_values(self) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = []
        for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
            values = [factor * 10.0**power for power in powers[:: max(1, len(powers) // 6)] for factor in factors]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) >= 3:
                break
        return values


def format_ticks(values: Sequence[float], *, log: bool = False) -> list[str]:
    """Return the labels of the ticks of one axis, all with the same number of decimals."""
    largest = max(map(abs, values), default=0)
    if log:
        return [f"{value:g}" if value < 1e4 else format_compact(value).replace(" ", "") for value in values]
    if largest >= 1e4:
        return [format_compact(value).replace(" ", "") for value in values]
    exponent = math.floor(math.log10(largest)) if 0 < largest < 1e-2 else 0
    scaled = [value / 10.0**exponent for value in values]
    decimals = next(n for n in range(12) if n == 11 or all(abs(round(v, n) - v) < 1e-6 for v in scaled))
    suffix = f"e{exponent}" if exponent else ""
    return [f"{value:.{decimals}f}{suffix}" if value else "0" for value in scaled]


def step_axis(low: float, high: float) -> Axis:
    """Return the axis of the steps, from 0 unless the history begins late."""
    low = 0.0 if low < high / 2 else low
    return Axis(low, high, whole=True) if high > low else Axis(low - 1, high + 1, whole=True)


def value_axis(values: np.ndarray, *, from_zero: bool = False) -> Axis:
    """Return the axis of the finite values with a margin; logarithmic when the largest is 50 times the smallest."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Axis(0.0, 1.0)
    low, high = float(finite.min()), float(finite.max())
    if not from_zero and low > 0 and high / low >= 50:
        return Axis(low / 1.15, high * 1.15, log=True)
    if from_zero and low >= 0:
        return Axis(0.0, high * 1.06 or 1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - margin, high + margin)


@dataclass(frozen=True)
class Line:
    """One drawn line: its CSS class, its name and last value in the legend, its path, and its points by name."""

    css: str
    name: str
    last: str
    path: str
    dots: list[tuple[str, str]]


@dataclass(frozen=True)
class Panel:
    """One chart to be drawn: which columns of the history, and how."""

    title: str
    unit: str = ""
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    from_zero: bool = False
    is_smooth: bool = True
    scale: float = 1.0
    wide: bool = False
    since: float = 0.0  # draw from this step on


@dataclass(frozen=True)
class Chart:
    """Everything the template needs to draw a panel; places are percentages from the left and from the top."""

    panel: Panel
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    is_log: bool
    token_ticks: list[tuple[float, str]]
    breaks: list[float]
    note: str


def charts(run: RunRecord, history: Curves) -> list[Chart]:
    """Return the charts that the history has values for, the loss first."""
    validation = history.validation_keys()
    losses = tuple(key for key in validation if split_metric(key)[1] == "loss")
    speeds = [key for key in history.columns if key.endswith("_per_second") and "/" not in key]
    unit = run.description.loss_unit
    panels = [
        Panel("Loss", unit, ("loss",), losses, wide=True),
        Panel("Learning rate", "", ("learning_rate",), from_zero=True, is_smooth=False),
        Panel("Gradient norm", "before clipping", ("grad_norm",)),
        *(Panel("Throughput", key.replace("_", " "), (key,), from_zero=True) for key in speeds),
        Panel("Model FLOPs utilisation", "%", ("mfu",), from_zero=True, scale=100),
    ]
    others = (key for key in validation if split_metric(key)[1] not in NOT_A_CHART)
    panels += [Panel(metric_label(key), validation=(key,)) for key in others if not is_baseline(key)]
    logged = history.columns.keys()
    found = [draw(panel, history) for panel in panels if logged & {*panel.train, *panel.validation}]
    return found[:1] + second_half(panels[0], history) + found[1:]


def second_half(panel: Panel, history: Curves) -> list[Chart]:
    """Return the chart of the second half, when the first half flattens it below a quarter of the height."""
    steps, values = history[panel.train[0]]
    late, finite = steps >= steps.max(initial=0) / 2, np.isfinite(values)
    if np.sum(late & finite) < 20 or np.ptp(values[late & finite]) > np.ptp(values[finite]) / 4:
        return []
    return [draw(replace(panel, title="Loss, second half", unit="", wide=False, since=float(steps[late][0])), history)]


def draw(panel: Panel, history: Curves) -> Chart:
    """Return the chart of a panel, at least one of whose columns was logged."""
    keys = [key for key in (*panel.train, *panel.validation) if key in history.columns]
    found = []  # (css class, name, steps, values)
    for key in keys:
        steps, values = history[key]
        css, name = ("train", "train") if key in panel.train else ("validation", "validation")
        shown, values = steps >= panel.since, panel.scale * values
        if css == "train" and panel.is_smooth and len(values) >= 20:
            found.append(("raw", "each log line", steps[shown], values[shown]))
            name, values = "train, smoothed", smooth(values)
        found.append((css, name, steps[shown], values[shown]))
    assert history.first_step is not None  # as something was logged
    assert history.last_step is not None
    x_axis = step_axis(max(history.first_step, panel.since), history.last_step)
    y_axis = value_axis(np.concatenate([line[3] for line in found]), from_zero=panel.from_zero)
    lines = [draw_line(*line, x_axis, y_axis) for line in found]
    breaks, note = find_breaks([line[2:] for line in found], x_axis)
    y_ticks = [(100 - place, label) for place, label in y_axis.ticks()]
    tokens = token_ticks(history, x_axis) if panel.wide else []
    return Chart(panel, lines, x_axis.ticks(10 if panel.wide else 5), y_ticks, y_axis.log, tokens, breaks, note)


def draw_line(css: str, name: str, steps: np.ndarray, values: np.ndarray, x_axis: Axis, y_axis: Axis) -> Line:
    """Return one line; it is interrupted where a value is not finite."""
    kept = thin(values)
    finite = np.isfinite(values[kept])
    x, y = x_axis.place(steps[kept]), 100 - y_axis.place(np.where(finite, values[kept], np.nan))
    starts = finite & ~np.concatenate([[False], finite[:-1]])
    path = "".join(f"{'M' if starts[i] else 'L'}{x[i]:.2f} {y[i]:.2f}" for i in np.flatnonzero(finite))
    alone = finite & starts & ~np.concatenate([finite[1:], [False]])
    named = finite if css == "validation" and finite.sum() <= MAX_DOTS else alone
    dots = [
        (
            f"M{x[i]:.2f} {y[i]:.2f}h.01",
            f"step {steps[kept][i]:,.0f}: {format_number(float(values[kept][i]))}",
        )
        for i in np.flatnonzero(named)
    ]
    return Line(css, name, format_number(float(values[-1])), path, dots)


def find_breaks(columns: list[tuple[np.ndarray, np.ndarray]], x_axis: Axis) -> tuple[list[float], str]:
    """Return where values are not finite, in percent (neighbours closer than half a percent once), and a sentence."""
    steps = np.unique(np.concatenate([steps[~np.isfinite(values)] for steps, values in columns]))
    if not len(steps):
        return [], ""
    shown = ", ".join(f"{step:,.0f}" for step in steps[:5]) + (f" … {steps[-1]:,.0f}" if len(steps) > 5 else "")
    found = (
        "One value is not finite (NaN or infinite), at step"
        if len(steps) == 1
        else (f"{len(steps):,} values are not finite (NaN or infinite), at steps")
    )
    places = sorted({round(2 * place) / 2 for place in x_axis.place(steps).tolist()})
    return places, f"{found} {shown}."


def token_ticks(history: Curves, x_axis: Axis) -> list[tuple[float, str]]:
    """Return the ticks of the tokens seen, placed where the steps reached them."""
    steps, tokens = history["tokens"]
    if len(steps) < 2 or not np.all(np.isfinite(tokens)) or np.any(np.diff(tokens) <= 0):
        return []
    values = [value for value in Axis(0.0, float(tokens[-1])).values(6) if value >= tokens[0]]
    places = x_axis.place(np.interp(values, tokens, steps)).tolist()
    return list(zip(places, [format_compact(value).replace(" ", "") for value in values], strict=True))
