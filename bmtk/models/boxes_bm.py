"""Boxes: geometry, target assignment of FCOS, non-maximum suppression.  N boxes, Q locations, K classes; pixels.

A box is (left, top, right, bottom); relative to a location, it is the distances (left, top, right, bottom) to its
four sides.  Sources: FCOS, Tian et al. 2019, arXiv:1904.01355; GIoU, Rezatofighi et al. 2019, arXiv:1902.09630; centre
sampling, Tian et al. 2020, arXiv:2006.09214.
"""

import math
from functools import reduce
from itertools import accumulate, pairwise

import numpy as np
import torch

BLOCK = 128  # boxes that suppression compares at once with those kept, and with each other


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
    return torch.stack(distances_by_side(points, boxes), dim=-1)


def distances_by_side(points: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same side by side, (Q, N) each: a side in one piece is faster than every fourth number of one tensor."""
    (x, y), (left, top, right, bottom) = points.T[..., None], boxes.T
    return x - left, y - top, right - x, bottom - y


def assign_boxes(
    points: torch.Tensor, strides: torch.Tensor, ranges: torch.Tensor, boxes: torch.Tensor, *, radius: float
) -> torch.Tensor:
    """The index (Q,) of the box that each location predicts, -1 for background: of several boxes, the smallest."""
    if len(boxes) == 0:
        return torch.full((len(points),), -1, device=points.device)
    taken = may_predict(points, strides, ranges, boxes, radius=radius)
    areas = ((boxes[:, 2:] - boxes[:, :2]).prod(-1)).expand(len(points), -1).masked_fill(~taken, torch.inf)
    least, index = areas.min(-1)
    return index.masked_fill(least.isinf(), -1)


def assign_batch(
    shapes: list[tuple[int, int]],
    strides: list[int],
    limits: list[float],
    boxes: torch.Tensor,
    counts: list[int],
    *,
    radius: float,
) -> torch.Tensor:
    """`assign_boxes` of B images (B, Q): `boxes` (N, 4) are those of one after the other, `counts` of each.

    `limits` (levels + 1) part the allowed distances of the levels.  Only places near the centre of a box are looked
    at, where these are fewer than all.
    """
    num_places = sum(rows * columns for rows, columns in shapes)
    across = math.ceil(2 * radius) + 2  # places of a level in a row that may lie within the radius
    if radius == 0 or len(strides) * across**2 >= num_places:
        points, levels = grid_locations(shapes, strides, boxes.device)
        sides = torch.tensor(strides, device=boxes.device, dtype=torch.float32)[levels]
        ranges = torch.tensor(list(pairwise(limits)), device=boxes.device)[levels]
        images = boxes.split(counts)
        return torch.stack([assign_boxes(points, sides, ranges, own, radius=radius) for own in images])
    # In numpy, whose calls cost less: there are many, of few numbers.
    sides = boxes.cpu().numpy()
    order = np.argsort((sides[:, 2:] - sides[:, :2]).prod(1), kind="stable")[::-1]  # the smallest writes last
    image = np.repeat(np.arange(len(counts)), counts)[order]
    own = order - np.array([0, *accumulate(counts)])[image]
    places, taken = places_near(shapes, strides, limits, sides[order], across, radius=radius)
    box, place = taken.nonzero()
    found = np.full((len(counts), num_places), -1)
    found[image[box], places[box, place]] = own[box]
    return torch.from_numpy(found).to(boxes.device)


def places_near(
    shapes: list[tuple[int, int]],
    strides: list[int],
    limits: list[float],
    boxes: np.ndarray,
    across: int,
    *,
    radius: float,
) -> tuple[np.ndarray, np.ndarray]:
    """`across` rows and columns of places of each level about the centres of boxes, and whether each `may_predict`.

    Both (N, levels * across * across); places that do not exist are not taken.
    """
    sides = np.array(strides, np.float32)[:, None, None]
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None, :, None]  # (N, 1, 2, 1), x and y
    index = np.floor(middle / sides - (0.5 + radius)) + np.arange(across, dtype=np.float32)  # (N, levels, 2, across)
    points = (index + 0.5) * sides
    before, after = points - boxes[:, None, :2, None], boxes[:, None, 2:, None] - points
    sizes = np.array([shape[::-1] for shape in shapes])[..., None]  # columns and rows
    inside = (index >= 0) & (index < sizes) & (np.minimum(before, after) > 0)
    inside &= np.abs(points - middle) < radius * sides
    farthest = np.maximum(before, after)
    farthest = np.maximum(farthest[:, :, 0, None], farthest[:, :, 1, :, None])  # (N, levels, across, across)
    low, high = np.array(list(pairwise(limits)), np.float32).T[..., None, None]
    taken = inside[:, :, 0, None] & inside[:, :, 1, :, None] & (farthest >= low) & (farthest <= high)
    index = index.astype(int)
    firsts = np.array([0, *accumulate(rows * columns for rows, columns in shapes[:-1])])[:, None, None]
    places = firsts + index[:, :, 1, :, None] * sizes[:, :1] + index[:, :, 0, None]
    shape = len(boxes), len(strides) * across**2
    return places.reshape(shape), taken.reshape(shape)


def may_predict(
    points: torch.Tensor, strides: torch.Tensor, ranges: torch.Tensor, boxes: torch.Tensor, *, radius: float
) -> torch.Tensor:
    """Whether each location may predict each box (Q, N) (FCOS, sections 3.1 and 3.2).

    It has to lie inside, less than `radius` strides (Q,) from the centre along each axis (0: anywhere inside), and the
    distance to its farthest side has to be in the range (Q, 2) of its level.
    """
    sides = distances_by_side(points, boxes)
    taken = reduce(torch.minimum, sides) > 0
    if radius > 0:
        (x, y), (across, along) = points.T[..., None], ((boxes[:, :2] + boxes[:, 2:]) / 2).T
        taken &= torch.maximum((x - across).abs(), (y - along).abs()) < radius * strides[:, None]
    farthest = reduce(torch.maximum, sides)
    taken &= (farthest >= ranges[:, :1]) & (farthest <= ranges[:, 1:])
    return taken


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
    boxes: torch.Tensor,
    scores: torch.Tensor,
    labels: torch.Tensor,
    *,
    iou_threshold: float,
    limit: int | None = None,
) -> torch.Tensor:
    """Indices of the kept boxes, best first; those that overlap a better one of their class by more are removed.

    At most `limit` are kept.  The next BLOCK boxes are compared with those that are kept, and with each other; no
    other pairs are, which are most of them where boxes crowd.
    """
    order = scores.argsort(descending=True, stable=True)
    sides = boxes[order].float().T.contiguous().cpu().numpy()  # left, top, right and bottom, (N,) each
    kinds, kept = labels[order].cpu().numpy(), np.zeros(0, dtype=int)

    def hides(some: np.ndarray, others: np.ndarray) -> np.ndarray:
        overlaps = overlaps_of_one(sides[:, some, None], sides[:, None, others])
        return (overlaps > iou_threshold) & (kinds[some, None] == kinds[others])

    for start in range(0, len(order), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(order)))
        block = block[~hides(kept, block).any(0)]
        is_hidden, stays = np.triu(hides(block, block), 1), np.ones(len(block), dtype=bool)
        for number in np.flatnonzero(is_hidden.any(1)):
            if stays[number]:
                stays &= ~is_hidden[number]
        kept = np.concatenate((kept, block[stays]))
        if limit is not None and len(kept) >= limit:
            break
    return order[torch.from_numpy(kept[:limit]).to(order.device)]


def overlaps_of_one(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (N,) of a box (4,) with others (4, N), as `pairwise_iou`; or of several, by shape."""
    left, top, right, bottom = others
    shared = np.maximum(np.minimum(box[2], right) - np.maximum(box[0], left), 0)
    shared *= np.maximum(np.minimum(box[3], bottom) - np.maximum(box[1], top), 0)
    own = np.maximum(box[2] - box[0], 0) * np.maximum(box[3] - box[1], 0)
    areas = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    return shared / np.maximum(own + areas - shared, np.finfo(np.float32).eps)


__all__ = [
    "assign_batch",
    "assign_boxes",
    "centerness",
    "centres",
    "corners",
    "distances_by_side",
    "grid_locations",
    "may_predict",
    "non_maximum_suppression",
    "overlap_of_distances",
    "overlaps_of_one",
    "pairwise_iou",
    "places_near",
    "side_distances",
]
