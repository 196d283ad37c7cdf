"""Recall at k and mean rank of retrieval."""

from collections.abc import Sequence

import numpy as np


def retrieval_scores(places: Sequence[int], top: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of the queries whose match is among the first k, and its mean place; places count from 1."""
    found = np.asarray(places)
    recalls = {f"recall_at_{k}": float((found <= k).mean()) for k in top}
    return {**recalls, "mean_rank": float(found.mean())}
