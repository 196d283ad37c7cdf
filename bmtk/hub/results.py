"""The metrics of a run: which come first, and how the model compares with a baseline that needs none."""

from .formatting import (
    BASELINES,
    LOWER_IS_BETTER,
    SPEEDS,
    format_number,
    is_baseline,
    is_number,
    is_quality,
    metric_label,
    split_metric,
)
from .run_record import RunRecord

TILES = ("accuracy", "macro_f1", "f1", "loss", "perplexity", "bits_per_byte")  # in order of interest, three are shown
SPLITS = ("test", "validation", "train")  # likewise of rows


def metric_rows(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (key, label, shown value) of every metric but the speed of the evaluation, in the run's own order."""
    named = ((key, value) for key, value in run.metrics.items() if is_number(value))
    named = ((key, value) for key, value in named if split_metric(key)[1] not in SPEEDS)
    return [(key, metric_label(key), format_number(value)) for key, value in named]


def ranked_metrics(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return (key, label, shown value) of the metrics of quality: the main one first, then TILES; each by SPLITS."""
    rows = [row for row in metric_rows(run) if is_quality(row[0]) and not is_baseline(row[0])]
    interest = [run.description.main_metric, *TILES]

    def rank(row: tuple[str, str, str]) -> tuple[int, ...]:
        return tuple(
            known.index(part) if part in known else len(known)
            for part, known in zip(reversed(split_metric(row[0])), (interest, SPLITS), strict=True)
        )

    return sorted(rows, key=rank)


def baselines(run: RunRecord, key: str) -> list[tuple[str, float]]:
    """Return (baseline in words, its value) for a metric, of the same rows."""
    metric = split_metric(key)[1]
    start = key.removesuffix(metric)
    found = ((words, run.metrics.get(f"{start}{prefix}{metric}")) for prefix, words in BASELINES.items())
    return [(words, value) for words, value in found if is_number(value)]


def worse_than_baseline(run: RunRecord) -> str:
    """Say that a baseline does better by the main metric; empty if none does."""
    for key, label, shown in ranked_metrics(run)[:1]:
        sign = -1 if LOWER_IS_BETTER.fullmatch(split_metric(key)[1]) else 1
        better = [(words, value) for words, value in baselines(run, key) if sign * value > sign * run.metrics[key]]
        if better:
            others = ", ".join(f"{words} {format_number(value)}" for words, value in better)
            return f"A baseline without a model does better: {label[:1].lower()}{label[1:]} {shown}, {others}."
    return ""
