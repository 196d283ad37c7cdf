"""Forecasts of many windows: naive ones, a table, and figures.  W windows, H steps, C columns, Q quantiles.

Arrays are (W, H, C), truth NaN where missing: such steps count nowhere.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from bmtk.data.windows import Windows

from .figures import as_svg, new_figure

MOST_COLUMNS = 3  # of a figure
PAST_SHOWN = 2  # forecast lengths of context before a forecast, in a figure


def naive_forecasts(rows: Windows, season: int) -> dict[str, np.ndarray]:
    """Forecasts that need no model: the last value, and the last season if the context holds one, over and over."""
    seasonal = {"seasonal_naive": rows.repeated(season)} if 1 < season <= rows.context else {}
    return {"naive": rows.repeated(1), **seasonal}


def table_of_columns(errors: Mapping[str, np.ndarray], columns: Sequence[str]) -> str:
    width = max(len("column"), *map(len, columns))
    lines = [f"  {'column':<{width}}      MSE      MAE    MASE  MAE in its own unit"]
    for place, name in enumerate(columns):
        mse, mae, mase, own = (errors[key][place] for key in ("mse", "mae", "mase", "original_mae"))
        lines.append(f"  {name:<{width}}  {mse:7.4f}  {mae:7.4f}  {mase:6.3f}  {own:.6g}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ figures


def best_median_worst(forecast: np.ndarray, truth: np.ndarray) -> dict[str, int]:
    """Windows by their mean squared error over all steps and columns; windows without truth are not among them."""
    error = np.nansum((forecast - truth) ** 2, axis=(1, 2)) / np.maximum((~np.isnan(truth)).sum((1, 2)), 1)
    known = np.flatnonzero(~np.isnan(truth).all((1, 2)))
    order = known[np.argsort(error[known], kind="stable")]
    return {"best": int(order[0]), "median": int(order[len(order) // 2]), "worst": int(order[-1])}


def figure_of_windows(
    forecast: np.ndarray,
    quantiles: np.ndarray | None,
    rows: Windows,
    columns: Sequence[str],
    scaling: Mapping[str, Sequence[float]],
    levels: Sequence[float],
) -> dict[str, str]:
    """Forecast and truth, with the end of the context, of the best, the median and the worst window."""
    windows = best_median_worst(forecast, rows.truth())
    shown = np.unique(np.linspace(0, len(columns) - 1, min(MOST_COLUMNS, len(columns))).astype(int))
    figure = new_figure(figsize=(11, 0.9 + 2.1 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), len(windows), squeeze=False, sharex=True)
    past = min(rows.context, PAST_SHOWN * rows.horizon)
    after, around = np.arange(1, rows.horizon + 1), np.arange(-past + 1, rows.horizon + 1)
    for line, column in enumerate(shown):
        for axes, (which, window) in zip(grid[line], windows.items(), strict=True):
            start, in_units = rows.starts[window], _in_units(scaling, column)
            truth = rows.values[start - past : start + rows.horizon, column]
            axes.axvline(0.5, color="0.8", linewidth=1)
            axes.plot(around, in_units(truth), color="0.25", linewidth=1, label="truth")
            if quantiles is not None:
                ends = (in_units(quantiles[window, :, column].min(-1)), in_units(quantiles[window, :, column].max(-1)))
                axes.fill_between(after, *ends, color="C0", alpha=0.25, label=f"{min(levels):g} to {max(levels):g}")
            axes.plot(after, in_units(forecast[window, :, column]), color="C0", linewidth=1.5, label="forecast")
            if line == 0:
                axes.set_title(f"{which} window ({window + 1:,} of {len(forecast):,})", fontsize=10)
            axes.tick_params(labelsize=8)
        grid[line][0].set_ylabel(columns[column])
    for axes in grid[-1]:
        axes.set_xlabel("steps after the end of the context", fontsize=9)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return as_svg(figure, "Forecasts and truth: the best, the median and the worst window")


def _in_units(scaling: Mapping[str, Sequence[float]], column: int) -> Callable[[np.ndarray], np.ndarray]:
    mean, std = scaling["mean"][column], scaling["std"][column]
    return lambda values: values * std + mean


def figure_of_steps(forecasts: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, str]:
    """Mean squared error of each step ahead, of the model and of the naive forecasts."""
    figure = new_figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, truth.shape[1] + 1)
    for place, (name, forecast) in enumerate(forecasts.items()):
        by_step = np.nanmean((forecast - truth) ** 2, axis=(0, 2))
        axes.plot(steps, by_step, label=name, color="C0" if place == 0 else ("0.4", "0.7")[place - 1])
    axes.set(xlabel="step ahead", ylabel="mean squared error, standardised", ylim=(0, None))
    axes.legend(fontsize=9)
    return as_svg(figure, "Error by step ahead")
