"""Boxes: geometry, target assignment of FCOS, non-maximum suppression.  N boxes, Q locations, K classes; pixels.

A box is (left, top, right, bottom); relative to a location, it is the distances (left, top, right, bottom) to its
four sides.  Sources: FCOS, Tian et al. 2019, arXiv:1904.01355; GIoU, Rezatofighi et al. 2019, arXiv:1902.09630; centre
sampling, Tian et al. 2020, arXiv:2006.09214.
"""

from functools import reduce

import numpy as np
import torch


def grid_locations(
    shapes: list[tuple[int, int]], strides: list[int], device=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Locations (Q, 2) as (x, y), the cell centres of all levels row by row, and the level (Q,) of each."""
    points, levels = [], []
    for level, ((rows, columns), stride) in enumerate(zip(shapes, strides, strict=True)):
        axes = torch.arange(rows, device=device), torch.arange(columns, device=device)
        y, x = torch.meshgrid(*axes, indexing="ij")  # (rows, columns) each
        points.append((torch.stack((x, y), dim=-1).flatten(0, 1) + 0.5) * stride)
        levels.append(torch.full((rows * columns,), level, device=device))
    return torch.cat(points), torch.cat(levels)


def side_distances(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Distances (Q, N, 4) from locations (Q, 2) to the sides of boxes (N, 4); all positive inside a box."""
    return torch.cat((points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]), dim=-1)


def assign_boxes(
    points: torch.Tensor, strides: torch.Tensor, ranges: torch.Tensor, boxes: torch.Tensor, *, radius: float
) -> torch.Tensor:
    """The index (Q,) of the box that each location predicts, -1 for background (FCOS, sections 3.1 and 3.2).

    A location predicts a box if it lies inside, less than `radius` strides (Q,) from the centre along each axis (0:
    anywhere inside), and the distance to its farthest side is in the range (Q, 2) of its level; of several boxes, the
    smallest.
    """
    if len(boxes) == 0:
        return torch.full((len(points),), -1, device=points.device)
    sides = side_distances(points, boxes).unbind(-1)  # (Q, N) each; amin over a last dimension of four is slow
    taken = reduce(torch.minimum, sides) > 0
    if radius > 0:
        from_centre = (points.T[:, :, None] - ((boxes[:, :2] + boxes[:, 2:]) / 2).T[:, None]).abs()  # (2, Q, N)
        taken &= torch.maximum(*from_centre) < radius * strides[:, None]
    farthest = reduce(torch.maximum, sides)
    taken &= (farthest >= ranges[:, :1]) & (farthest <= ranges[:, 1:])
    areas = ((boxes[:, 2:] - boxes[:, :2]).prod(-1)).expand(len(points), -1).masked_fill(~taken, torch.inf)
    least, index = areas.min(-1)
    return index.masked_fill(least.isinf(), -1)


def centerness(distances: torch.Tensor) -> torch.Tensor:
    """1 at the centre of a box, 0 at its sides (FCOS, eq. 3): distances (..., 4) -> (...)."""
    left, top, right, bottom = distances.unbind(-1)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    along = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * along).sqrt()


def overlap_of_distances(predicted: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and GIoU of pairs of boxes, both as positive distances (..., 4) from one location inside both."""

    def area(sides: torch.Tensor) -> torch.Tensor:
        return (sides[..., 0] + sides[..., 2]) * (sides[..., 1] + sides[..., 3])

    shared = area(torch.minimum(predicted, target))
    union = area(predicted) + area(target) - shared
    hull = area(torch.maximum(predicted, target))
    iou = shared / union
    return iou, iou - (hull - union) / hull


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def centres(boxes: torch.Tensor) -> torch.Tensor:
    """(left, top, right, bottom) -> (centre x, centre y, width, height)."""
    return torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]), dim=-1)


def pairwise_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union (N, M) of boxes (N, 4) and (M, 4); 0 where both are empty."""
    one, other = boxes.T.contiguous()[:, :, None], others.T.contiguous()[:, None]  # a side of all boxes is one row
    across, along = (
        (torch.minimum(one[side + 2], other[side + 2]) - torch.maximum(one[side], other[side])).clamp(min=0)
        for side in (0, 1)
    )
    shared = across * along
    areas, other_areas = ((b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (boxes, others))
    return shared / (areas[:, None] + other_areas[None] - shared).clamp(min=torch.finfo(boxes.dtype).eps)


def non_maximum_suppression(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, *, iou_threshold: float
) -> torch.Tensor:
    """Indices of the kept boxes, best first; those that overlap a better one of their class by more are removed."""
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    rivals = (pairwise_iou(boxes, boxes) > iou_threshold) & (labels[:, None] == labels[None])
    rivals = rivals.triu(1).cpu()  # (better, worse)
    rows, stays = rivals.numpy(), np.ones(len(boxes), dtype=bool)
    for index in range(len(boxes)):
        if stays[index]:
            stays &= ~rows[index]
    return order[torch.from_numpy(stays).to(order.device)]


__all__ = [
    "assign_boxes",
    "centerness",
    "centres",
    "corners",
    "grid_locations",
    "non_maximum_suppression",
    "overlap_of_distances",
    "pairwise_iou",
    "side_distances",
]
