"""COCO average precision of detected boxes.  T overlaps, K labels; a box is [left, top, width, height]."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MOST_FOUND = 100  # boxes of an image that count, the best first, as in COCO


def average_precisions(
    truth: Sequence[dict[str, Any]], predictions: Sequence[dict[str, Any]], num_labels: int
) -> np.ndarray:
    """COCO's AP (T, K) at overlaps (IoU) of 0.50, 0.55, ..., 0.95; NaN for a label that no image holds.

    Both are images of the same order: {"boxes", "labels"}, the predictions with "scores".
    Source: pycocotools; an AP is the mean precision at the recalls 0, 0.01, ..., 1.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        measured = Matching(_coco(truth, num_labels), _coco(predictions, num_labels), "bbox")
        measured.params.areaRng, measured.params.areaRngLbl = [[0, 1e10]], ["all"]
        measured.params.maxDets = [MOST_FOUND]
        measured.evaluate()
        measured.accumulate()
    precision = measured.eval["precision"][..., 0, 0]  # (T, recalls, K), -1 for a label that no image holds
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1))


class Matching(COCOeval):
    """COCO's evaluation, with the boxes of an image matched at all overlaps at once; none is a crowd or ignored."""

    def evaluateImg(self, image: int, label: int, area_range: Any, most: int) -> dict[str, Any] | None:
        """Which of the boxes found, best first, match a true one that no better box has matched."""
        truth, found = self._gts[image, label], self._dts[image, label]
        if not truth and not found:
            return None
        scores = np.array([box["score"] for box in found])
        scores = scores[np.argsort(-scores, kind="mergesort")][:most]
        overlaps, limits = self.ious[image, label], np.minimum(self.params.iouThrs, 1 - 1e-10)
        matches, is_free = np.zeros((len(limits), len(scores))), np.ones((len(limits), len(truth)), dtype=bool)
        candidates: Any = np.flatnonzero(overlaps.max(1) >= limits[0]) if truth and found else []
        for number in candidates:
            allowed = np.where(is_free, overlaps[number], -1.0)  # (T, true boxes)
            best = len(truth) - 1 - allowed[:, ::-1].argmax(1)  # of equal ones the last
            hits = np.flatnonzero(allowed.max(1) >= limits)
            matches[hits, number], is_free[hits, best[hits]] = 1, False
        ignored = {"gtIgnore": np.zeros(len(truth)), "dtIgnore": np.zeros_like(matches)}
        return {"dtScores": scores, "dtMatches": matches, **ignored}


def _coco(images: Sequence[dict[str, Any]], num_labels: int) -> COCO:
    objects = [
        {"image_id": number, "bbox": list(box), "category_id": label, "area": box[2] * box[3], "iscrowd": 0, **score}
        for number, image in enumerate(images)
        for box, label, score in zip(image["boxes"], image["labels"], _scores(image), strict=True)
    ]
    index = COCO()
    index.dataset = {
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": label} for label in range(num_labels)],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(objects, 1)],  # 0 means "no match"
    }
    index.createIndex()
    return index


def _scores(image: dict[str, Any]) -> list[dict[str, float]]:
    return [{"score": score} for score in image["scores"]] if "scores" in image else [{}] * len(image["boxes"])


def summary(precisions: np.ndarray) -> dict[str, float]:
    """Of `average_precisions` (T, K): the mean of all, and of those at overlaps of 0.50 and 0.75."""
    means = {"map": precisions, "map_50": precisions[0], "map_75": precisions[5]}
    return {name: float(np.nanmean(values)) for name, values in means.items()}
