"""Pictures for the report, drawn with matplotlib: {"title", "svg"} or {"title", "png_base64"}."""

import base64
import io
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

MOST_NAMES = 40  # labels that are named on an axis
MOST_NUMBERS = 20  # labels whose cells hold their counts


def as_svg(figure: Figure, title: str) -> dict[str, str]:
    """A drawing: sharp at every size."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return {"title": title, "svg": text.getvalue()}


def as_png(figure: Figure, title: str, *, dots_per_inch: int = 110) -> dict[str, str]:
    """For what holds photographs."""
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", dpi=dots_per_inch, metadata={"Software": None})
    return {"title": title, "png_base64": base64.b64encode(content.getvalue()).decode()}


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> dict[str, str]:
    """How many rows of each label (down) got which label (across); shades are shares of a label's rows."""
    counts = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(counts, (truth, predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(9.0, 2.2 + 0.42 * len(labels))
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label of the data")
    if len(labels) <= MOST_NAMES:
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
    if len(labels) <= MOST_NUMBERS:
        for row, across in np.argwhere(counts):
            colour = "white" if shares[row, across] > 0.5 else "black"
            axes.text(across, row, f"{counts[row, across]:,}", ha="center", va="center", color=colour, fontsize=8)
    return as_svg(figure, "Confusion matrix")


def sentence_scores(scores: Sequence[float], lengths: Sequence[int]) -> dict[str, str]:
    """How good translations are, one by one: a histogram of chrF, and the chrF of sources of each length."""
    scores, lengths = np.asarray(scores), np.asarray(lengths)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(scores, bins=np.linspace(0, 100, 26), color="tab:blue")
    left.set(xlabel="chrF of a sentence", ylabel="sentences", xlim=(0, 100))
    edges = np.unique([lengths.min() - 1, *np.quantile(lengths, np.linspace(0.125, 1, 8), method="inverted_cdf")])
    groups = [scores[(low < lengths) & (lengths <= high)] for low, high in pairwise(edges)]
    names = [f"{low + 1}-{high}" if low + 1 < high else f"{high}" for low, high in pairwise(edges)]
    right.boxplot(groups, tick_labels=names, showfliers=False, medianprops={"color": "tab:blue"})
    right.tick_params(axis="x", rotation=45)
    right.set(xlabel="tokens of the source", ylabel="chrF", ylim=(0, 100))
    return as_svg(figure, "Quality of each sentence")
