"""Errors and correlations of regression."""

import numpy as np


def regression_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Errors and correlations of (N,); a correlation or R² of constant numbers is NaN."""
    from scipy.stats import pearsonr, spearmanr  # half a second to import

    # float64: the squares of a spread that is small beside the mean cancel in float32.
    truth, predicted = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    error, spread = predicted - truth, ((truth - truth.mean()) ** 2).sum()
    varies = min(np.ptp(truth), np.ptp(predicted)) > 0
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": float(1 - (error**2).sum() / spread) if spread else np.nan,
        "pearson": float(pearsonr(truth, predicted).statistic) if varies else np.nan,
        "spearman": float(spearmanr(truth, predicted).statistic) if varies else np.nan,
    }
