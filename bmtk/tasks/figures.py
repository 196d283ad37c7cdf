"""Pictures for the report, drawn with matplotlib: {"title", "svg"} or {"title", "png_base64"}."""

import base64
import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES = 40  # labels that are named on an axis
MOST_NUMBERS = 20  # labels whose cells hold their counts


def new_figure(**options: Any) -> "Figure":
    from matplotlib.figure import Figure  # a third of a second to import, and needed when all is done

    return Figure(**options)


def as_svg(figure: "Figure", title: str) -> dict[str, str]:
    """A drawing: sharp at every size."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return {"title": title, "svg": text.getvalue()}


def as_png(figure: "Figure", title: str, *, dots_per_inch: int = 110) -> dict[str, str]:
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
    figure = new_figure(figsize=(side, side))
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


def hits_and_misses(truth: np.ndarray, found: np.ndarray, labels: Sequence[str]) -> dict[str, str]:
    """Rows that have each label and got it, that have it and did not get it, and that got it wrongly; (N, K), bool."""
    order = np.argsort(truth.sum(0), kind="stable")[-MOST_NAMES:]  # the most frequent ones, at the top
    names = [labels[label] for label in order]
    figure = new_figure(figsize=(7, 1.2 + 0.28 * len(names)))
    axes, left = figure.add_subplot(), np.zeros(len(names))
    parts = {"found": (truth & found, "tab:blue"), "missed": (truth & ~found, "lightgrey")}
    for name, (rows, colour) in {**parts, "wrongly given": (found & ~truth, "tab:orange")}.items():
        axes.barh(names, rows.sum(0)[order], left=left, color=colour, label=name)
        left += rows.sum(0)[order]
    axes.set_xlabel("rows")
    axes.legend(loc="lower right", fontsize=8)
    return as_svg(figure, "Labels found, missed and wrongly given")


def truth_and_prediction(truth: np.ndarray, predicted: np.ndarray, name: str) -> dict[str, str]:
    """Each row as a point; those on the line are right."""
    figure = new_figure(figsize=(4.5, 4.5))
    axes = figure.add_subplot()
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot([low, high], [low, high], color="grey", linewidth=0.8)
    axes.scatter(truth, predicted, s=9, alpha=0.6, linewidths=0)
    axes.set(xlabel=f"{name} of the data", ylabel="predicted")
    return as_png(figure, "Predictions and truth")


def spectrograms(recordings: Sequence[np.ndarray], names: Sequence[str], rate: int) -> dict[str, str]:
    """Loudness over time (across) and frequency (up) of recordings (N,) of `rate` Hz, each under its name."""
    across = min(3, len(recordings))
    down = -(-len(recordings) // across)
    figure = new_figure(figsize=(3.4 * across, 2.5 * down), layout="constrained")
    cells = figure.subplots(down, across, squeeze=False).flatten()
    for axes, samples, name in zip(cells, recordings, names, strict=False):
        window = max(16, rate // 40)  # 25 ms
        samples = np.pad(samples, (0, max(0, window - len(samples))))
        frames = np.lib.stride_tricks.sliding_window_view(samples, window)[:: max(1, rate // 200)] * np.hanning(window)
        decibels = 20 * np.log10(np.abs(np.fft.rfft(frames, n=2 * window)) + 1e-6).T
        extent = (0, len(samples) / rate, 0, rate / 2000)
        loudest = decibels.max()
        axes.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=loudest - 70, vmax=loudest)
        axes.set_title(textwrap.fill(name, 34), fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in cells[len(recordings) :]:
        axes.remove()
    figure.supxlabel("seconds", fontsize=9)
    figure.supylabel("kHz", fontsize=9)
    return as_png(figure, "Spectrograms of the worst recordings")


def png_of_pixels(image: np.ndarray) -> str:
    """An image (C, H, W), uint8, of one channel or three, as a PNG file in base64."""
    with io.BytesIO() as file:
        PIL.Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def image_grid(
    images: Sequence[np.ndarray], captions: Sequence[str], title: str, *, columns: int = 6
) -> dict[str, str]:
    """Images (C, H, W), uint8, in rows, each under its caption of two lines."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(figsize=(1.55 * columns, 1.95 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8)
    return as_png(figure, title)


def sentence_scores(scores: Sequence[float], lengths: Sequence[int]) -> dict[str, str]:
    """How good translations are, one by one: a histogram of chrF, and the chrF of sources of each length."""
    values, sizes = np.asarray(scores), np.asarray(lengths)
    figure = new_figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(values, bins=np.linspace(0, 100, 26), color="tab:blue")
    left.set(xlabel="chrF of a sentence", ylabel="sentences", xlim=(0, 100))
    edges = np.unique([sizes.min() - 1, *np.quantile(sizes, np.linspace(0.125, 1, 8), method="inverted_cdf")])
    groups = [values[(low < sizes) & (sizes <= high)] for low, high in pairwise(edges)]
    names = [f"{low + 1}-{high}" if low + 1 < high else f"{high}" for low, high in pairwise(edges)]
    right.boxplot(groups, tick_labels=names, showfliers=False, medianprops={"color": "tab:blue"})
    right.tick_params(axis="x", rotation=45)
    right.set(xlabel="tokens of the source", ylabel="chrF", ylim=(0, 100))
    return as_svg(figure, "Quality of each sentence")
