"""How good forecasts of many windows are.  W windows, H steps, C columns, Q quantiles.

Arrays are (W, H, C), truth NaN where missing: such steps count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROUNDING = 1e-6  # of a value's size, by which one of 0 differs from it after standardising in float32


def column_errors(forecast: np.ndarray, truth: np.ndarray, scaling: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Each (C,): squared and absolute errors, of standardised values and in units of the data; MASE.

    MASE: absolute error over that of the seasonal naive forecast in the training data, NaN where this is 0
    (Hyndman & Koehler 2006).
    """
    error, std = forecast.astype(np.float64) - truth, np.array(scaling["std"])
    squared, absolute = np.nanmean(error**2, axis=(0, 1)), np.nanmean(np.abs(error), axis=(0, 1))
    scale = np.array(scaling["seasonal_error"])
    return {
        "mse": squared,
        "mae": absolute,
        "original_mse": squared * std**2,
        "original_mae": absolute * std,
        "mase": np.divide(absolute * std, scale, where=scale > 0, out=np.full_like(scale, np.nan)),
    }


def scores(forecast: np.ndarray, truth: np.ndarray, scaling: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """MSE and MAE over all observed values; MASE as the mean over the columns that have one."""
    error = forecast.astype(np.float64) - truth
    original = error * np.array(scaling["std"])
    metrics = {
        "mse": np.nanmean(error**2),
        "mae": np.nanmean(np.abs(error)),
        "original_mse": np.nanmean(original**2),
        "original_mae": np.nanmean(np.abs(original)),
    }
    mase = column_errors(forecast, truth, scaling)["mase"]
    if np.isfinite(mase).any():
        metrics["mase"] = np.nanmean(mase)
    return {name: float(value) for name, value in metrics.items()}


def quantile_scores(
    quantiles: np.ndarray, levels: Sequence[float], truth: np.ndarray, scaling: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Pinball loss of `quantiles` (W, H, C, Q) and how often the truth lies within the outermost two.

    quantile_loss: mean over values and levels, standardised.  weighted_quantile_loss: in units of the data, twice the
    sum over the sum of absolute values, mean over levels (Salinas et al. 2017, arXiv:1704.04110, section 4); over the
    number of values where all of them are 0.
    """
    std, mean = np.array(scaling["std"]), np.array(scaling["mean"])
    error, q = truth[..., None] - quantiles.astype(np.float64), np.array(levels)
    pinball = np.maximum(q * error, (q - 1) * error)
    total, count = np.nansum(np.abs(truth * std + mean)), (~np.isnan(truth)).sum()
    if total <= ROUNDING * count * (np.abs(mean) + std).mean():
        total = count
    inside = (truth >= quantiles.min(-1)) & (truth <= quantiles.max(-1))
    return {
        "quantile_loss": float(np.nanmean(pinball)),
        "weighted_quantile_loss": float(2 * np.nansum(pinball * std[:, None]) / len(q) / total),
        "coverage": float(inside[~np.isnan(truth)].mean()),
    }
