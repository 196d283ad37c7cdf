"""Object detection: FCOS and its post-processing against loops written from the papers."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForObjectDetection

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.boxes_bm import (
    assign_batch,
    assign_boxes,
    centerness,
    centres,
    corners,
    grid_locations,
    non_maximum_suppression,
    overlap_of_distances,
    pairwise_iou,
    side_distances,
)
from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.heads_detection_bm import focal_loss, last_map_of_each_stride
from bmtk.models.image_processing_bm import BmImageProcessor

TINY = {
    "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1], "num_labels": 3, "fpn_size": 16, "num_detection_layers": 1,
    "num_feature_levels": 4, "norm_type": "layer_norm",
}  # fmt: skip


def random_boxes(count: int, size: float) -> torch.Tensor:
    low = torch.rand(count, 2) * size * 0.8
    return torch.cat((low, low + 2 + torch.rand(count, 2) * size * 0.7), dim=1)


def label(boxes: torch.Tensor, size: int, classes=None) -> dict[str, torch.Tensor]:
    classes = torch.arange(len(boxes)) % TINY["num_labels"] if classes is None else torch.tensor(classes)
    return {"class_labels": classes, "boxes": centres(boxes) / size}


def detector(**fields):
    return AutoModelForObjectDetection.from_config(BmCnnConfig(**{**TINY, **fields}))


def assigned_by_loops(points, strides, ranges, boxes, radius) -> list[int]:
    """FCOS, sections 3.1 and 3.2, location by location, box by box."""
    result = []
    for (x, y), stride, (low, high) in zip(points.tolist(), strides.tolist(), ranges.tolist(), strict=True):
        best, best_area = -1, math.inf
        for index, (left, top, right, bottom) in enumerate(boxes.tolist()):
            sides = [x - left, y - top, right - x, bottom - y]
            if min(sides) <= 0 or not low <= max(sides) <= high:
                continue
            centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
            if radius and not (abs(x - centre_x) < radius * stride and abs(y - centre_y) < radius * stride):
                continue
            if (right - left) * (bottom - top) < best_area:
                best, best_area = index, (right - left) * (bottom - top)
        result.append(best)
    return result


@pytest.mark.parametrize("radius", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_assignment_equals_a_loop_over_locations_and_boxes(count, radius):
    points, levels = grid_locations([(12, 10), (6, 5), (3, 3)], [8, 16, 32])
    strides = torch.tensor([8.0, 16.0, 32.0])[levels]
    ranges = torch.tensor([[0, 24], [24, 48], [48, math.inf]])[levels]
    boxes = random_boxes(count, 90.0).double().float()
    assigned = assign_boxes(points, strides, ranges, boxes, radius=radius)
    assert assigned.tolist() == assigned_by_loops(points, strides, ranges, boxes, radius)
    if count == 12:
        assert len(set(assigned.tolist())) > 3
        assert -1 in assigned


@pytest.mark.parametrize("radius", [0.0, 0.7, 1.5, 3.0])  # of 0 and 3, all places are looked at
@pytest.mark.parametrize("counts", [(0, 0), (12, 0, 1), (0, 5, 12, 0)])
def test_assignment_of_a_batch_equals_a_loop_over_its_images(counts, radius):
    shapes, strides, limits = [(12, 10), (6, 5), (3, 3)], [8, 16, 32], [0.0, 24.0, 48.0, math.inf]
    points, levels = grid_locations(shapes, strides)
    ranges = torch.tensor([[0, 24], [24, 48], [48, math.inf]])[levels]
    boxes = [random_boxes(count, 90.0) - 8 for count in counts]  # also beyond the first row and column
    boxes = [torch.cat((own.round(), own.round(), own)) for own in boxes]  # of equal boxes the first is meant
    found = assign_batch(shapes, strides, limits, torch.cat(boxes), [len(own) for own in boxes], radius=radius)
    expected = [assigned_by_loops(points, torch.tensor(strides)[levels], ranges, own, radius) for own in boxes]
    assert found.tolist() == expected
    assert (found >= 0).any() == any(counts)


def test_locations_are_the_middles_of_cells_row_by_row():
    points, levels = grid_locations([(1, 2), (1, 1)], [8, 16])
    assert points.tolist() == [[4, 4], [12, 4], [8, 8]]
    assert levels.tolist() == [0, 0, 1]


def test_ranges_of_the_paper():
    """FCOS, section 3.2: 0, 64, 128, 256, 512 and infinity, for strides 8 to 128."""
    with torch.device("meta"):
        model = detector(hidden_sizes=[8] * 4, depths=[1] * 4, stem_type="conv", stem_width=8, num_feature_levels=5)
    assert model.strides == [8, 16, 32, 64, 128]
    _, strides, ranges = model.locations([(1, 1)] * 5, "cpu")
    assert strides.tolist() == model.strides
    assert ranges.tolist() == [[0, 64], [64, 128], [128, 256], [256, 512], [512, math.inf]]


def test_centerness_of_a_location():
    distances = torch.tensor([[5.0, 5, 5, 5], [1, 2, 4, 8], [0.0, 1, 1, 1]])
    assert centerness(distances).tolist() == pytest.approx([1, math.sqrt(1 / 4 * 2 / 8), 0])


def test_overlaps_of_distances_equal_overlaps_of_boxes():
    point = torch.tensor([[20.0, 30.0]])
    predicted, target = torch.rand(2, 50, 4) * 10 + 0.1
    boxes, others = (torch.cat((point - d[:, :2], point + d[:, 2:]), dim=1) for d in (predicted, target))
    iou, giou = overlap_of_distances(predicted, target)
    assert torch.allclose(iou, pairwise_iou(boxes, others).diagonal(), atol=1e-5)
    hull = (torch.maximum(boxes, others)[:, 2:] - torch.minimum(boxes, others)[:, :2]).prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    union = (areas + other_areas) / (1 + iou)
    assert torch.allclose(giou, iou - (hull - union) / hull, atol=1e-5)


def iou_of_two(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def suppressed_by_loops(boxes, scores, labels, threshold) -> list[int]:
    left, kept = sorted(range(len(boxes)), key=lambda i: -scores[i]), []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if labels[i] != labels[best] or iou_of_two(boxes[i], boxes[best]) <= threshold]
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("count", [0, 1, 80, 300])  # more than one block of boxes
def test_suppression_equals_a_loop(count, threshold):
    boxes, scores, labels = random_boxes(count, 40.0), torch.rand(count), torch.randint(0, 3, (count,))
    kept = non_maximum_suppression(boxes, scores, labels, iou_threshold=threshold)
    assert kept.tolist() == suppressed_by_loops(boxes.tolist(), scores.tolist(), labels.tolist(), threshold)


@pytest.mark.parametrize("limit", [7, 60])
def test_suppression_stops_at_its_limit_with_the_best(limit):
    boxes, scores, labels = random_boxes(300, 120.0), torch.rand(300), torch.randint(0, 3, (300,))
    every = suppressed_by_loops(boxes.tolist(), scores.tolist(), labels.tolist(), 0.3)
    kept = non_maximum_suppression(boxes, scores, labels, iou_threshold=0.3, limit=limit)
    assert len(every) > limit
    assert kept.tolist() == every[:limit]


def test_corners_and_centres_are_inverse():
    boxes = torch.tensor([[1.0, 2, 5, 10]])
    assert centres(boxes).tolist() == [[3, 6, 4, 8]]
    assert torch.equal(corners(centres(boxes)), boxes)


def test_focal_loss_equals_the_papers_formula():
    logits, targets = torch.randn(40), (torch.rand(40) < 0.5).float()
    expected = []
    for logit, target in zip(logits.tolist(), targets.tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        p, alpha = (probability, 0.3) if target else (1 - probability, 0.7)
        expected.append(-alpha * (1 - p) ** 1.5 * math.log(p))
    assert focal_loss(logits, targets, alpha=0.3, gamma=1.5).tolist() == pytest.approx(expected, abs=1e-5)


def loss_by_loops(model, outputs, labels, size: int) -> tuple[dict[str, float], int]:
    """The three sums, and the number of positive locations, from what the model returned."""
    config = model.config
    shapes, side = [], size // model.strides[0]
    while len(shapes) < len(model.strides):
        shapes.append((side, side))
        side = (side + 1) // 2
    points, strides, ranges = model.locations(shapes, "cpu")
    boxes = corners(outputs.pred_boxes) * size
    sums, positives = {"class": 0.0, "box": 0.0, "centerness": 0.0}, 0
    for row, entry in enumerate(labels):
        targets = corners(entry["boxes"]) * size
        assigned = assigned_by_loops(points, strides, ranges, targets, config.center_sampling_radius)
        for location, index in enumerate(assigned):
            one_hot = torch.zeros(config.num_labels)
            if index >= 0:
                positives += 1
                one_hot[entry["class_labels"][index]] = 1
                iou = iou_of_two(boxes[row, location].tolist(), targets[index].tolist())
                sums["box"] += -math.log(iou)
                goal = centerness(side_distances(points[location][None], targets[index][None])[0, 0])
                logit = outputs.pred_centerness[row, location]
                sums["centerness"] += F.binary_cross_entropy_with_logits(logit, goal).item()
            logits = outputs.logits[row, location]
            sums["class"] += (
                focal_loss(logits, one_hot, alpha=config.focal_alpha, gamma=config.focal_gamma).sum().item()
            )
    return sums, positives


@torch.no_grad()
def test_the_loss_equals_a_loop_over_locations(record_property):
    model = detector(box_loss="iou").eval()
    labels = [label(random_boxes(4, 64.0).clamp(max=63), 64), label(random_boxes(0, 64.0), 64)]
    pixels = torch.randn(2, 3, 64, 64)
    outputs = model(pixels, labels=labels)
    sums, positives = loss_by_loops(model, outputs, labels, 64)
    assert positives > 5
    assert model.count_items(pixels, labels) == positives
    for name, total in sums.items():
        record_property("largest_oracle_difference", abs(outputs.loss_dict[name].item() - total / positives))
        assert outputs.loss_dict[name].item() == pytest.approx(total / positives, rel=1e-5)
    assert outputs.loss.item() == pytest.approx(sum(sums.values()) / positives, rel=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 70)])
def test_items_are_counted_without_a_forward_for_any_size(size):
    model = detector().eval()
    labels = [label(random_boxes(3, 40.0), 64), label(random_boxes(2, 40.0), 64)]
    pixels = torch.randn(2, 3, *size)
    outputs = model(pixels, labels=labels)
    total = sum(model(pixels, labels=labels, num_items_in_batch=1).loss_dict.values())
    assert model.count_items(pixels_values := pixels, labels) > 0
    assert torch.allclose(outputs.loss * model.count_items(pixels_values, labels), total)
    assert sum(rows * columns for rows, columns in model.level_shapes(size)) == outputs.logits.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 160])
def test_locations_that_are_assigned_before_give_the_same_loss_and_are_not_assigned_again(size):
    model = detector().eval()
    labels = [label(random_boxes(count, float(size)), size) for count in (0, 4, 0, 3, 0)]
    pixels = torch.randn(5, 3, size, size)
    alone = model(pixels, labels=labels, output_row_losses=True)
    assigned = model.assign_locations(pixels, labels)
    given = [{**one, "assigned": places} for one, places in zip(labels, assigned, strict=True)]
    found = model(pixels, labels=given, output_row_losses=True)
    assert torch.equal(found.loss, alone.loss)
    assert torch.equal(found.row_losses, alone.row_losses)
    assert (found.row_items > 0).tolist() == [False, True, False, True, False]
    none = [{**one, "assigned": torch.full_like(places, -1)} for one, places in zip(labels, assigned, strict=True)]
    assert model(pixels, labels=none).loss_dict["box"] == 0


def test_any_split_of_a_batch_gives_the_same_gradient():
    model = detector()
    labels = [label(random_boxes(count, 60.0), 64) for count in (1, 5, 0, 2)]
    pixels = torch.randn(4, 3, 64, 64)

    def gradient(parts) -> torch.Tensor:
        model.zero_grad()
        num_items = sum(model.count_items(pixels[part], labels[part]) for part in parts)
        for part in parts:
            model(pixels[part], labels=labels[part], num_items_in_batch=num_items).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([slice(0, 4)])
    assert (gradient([slice(0, 1), slice(1, 2), slice(2, 4)]) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_an_image_without_objects_still_reaches_every_parameter():
    """Distributed training waits for the gradient of every parameter."""
    model = detector()
    loss = model(torch.randn(1, 3, 64, 64), labels=[label(random_boxes(0, 64.0), 64)]).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_batch_without_objects_has_no_box_loss_and_starts_calm():
    terms = detector()(torch.randn(2, 3, 64, 64), labels=[label(random_boxes(0, 64.0), 64)] * 2).loss_dict
    assert (terms["box"], terms["centerness"]) == (0, 0)
    model = detector()
    assert torch.allclose(model(torch.zeros(1, 3, 64, 64)).logits.sigmoid(), torch.tensor(0.01), atol=2e-3)


def test_the_pyramid_adds_coarse_maps_to_fine_ones():
    pyramid = detector(num_feature_levels=5).pyramid
    maps = [torch.randn(1, 8, 16, 12), torch.randn(1, 8, 8, 6), torch.randn(1, 16, 4, 3)]
    levels = pyramid(maps)
    laterals = [conv(x) for conv, x in zip(pyramid.laterals, maps, strict=True)]
    second = laterals[1] + laterals[2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    first = laterals[0] + second.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for level, conv, x in zip(levels, pyramid.smooth, (first, second, laterals[2]), strict=False):
        assert torch.allclose(level, conv(x), atol=1e-6)
    assert torch.equal(levels[3], pyramid.extra[0](levels[2]))
    assert torch.equal(levels[4], pyramid.extra[1](levels[3].relu()))


def test_the_deepest_map_of_each_stride_is_used_and_never_the_stems():
    assert last_map_of_each_stride([4, 4, 8, 16, 32]) == [2, 3, 4]
    assert last_map_of_each_stride([1, 2, 4, 4]) == [1, 3]
    with pytest.raises(ValueError, match="at least one stage"):
        last_map_of_each_stride([1])


def test_a_class_beyond_num_labels_is_refused():
    with pytest.raises(ValueError, match=r"class_labels hold 0 to 3; num_labels=3 allows 0 to 2"):
        detector()(torch.zeros(1, 3, 64, 64), labels=[label(random_boxes(2, 64.0), 64, classes=[0, 3])])


def outputs_of(boxes, logits, centre=20.0) -> SimpleNamespace:
    boxes, logits = torch.tensor(boxes)[None], torch.tensor(logits)[None]
    return SimpleNamespace(
        logits=logits, pred_boxes=centres(boxes), pred_centerness=torch.full(logits.shape[:2], centre)
    )


def test_post_processing_suppresses_by_class_scales_and_sorts():
    outputs = outputs_of(
        [[0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.48], [0.6, 0.6, 1.2, 0.9]],
        [[2.0, -9.0], [3.0, 1.0], [-9.0, 0.5]],
    )
    (result,) = BmImageProcessor().post_process_object_detection(outputs, threshold=0.5, target_sizes=[(100, 200)])
    expected = [math.sqrt(1 / (1 + math.exp(-logit))) for logit in (3.0, 1.0, 0.5)]
    assert result["scores"].tolist() == pytest.approx(expected, abs=1e-5)
    assert result["labels"].tolist() == [0, 1, 1]
    assert result["boxes"].flatten().tolist() == pytest.approx(
        [20, 10, 100, 48, 20, 10, 100, 48, 120, 60, 200, 90], abs=1e-3
    )
    settings = {"threshold": 0.5, "nms_threshold": 0.99, "max_detections": 3}
    (loose,) = BmImageProcessor().post_process_object_detection(outputs, **settings)
    assert loose["labels"].tolist() == [0, 0, 1]
    assert loose["boxes"].max() <= 1


def test_centerness_lowers_a_score():
    outputs = outputs_of([[0.1, 0.1, 0.5, 0.5]], [[20.0]], centre=0.0)
    (result,) = BmImageProcessor().post_process_object_detection(outputs, threshold=0.1)
    assert result["scores"].item() == pytest.approx(math.sqrt(0.5), abs=1e-4)


def test_post_processing_of_nothing_is_empty():
    outputs = outputs_of([[0.1, 0.1, 0.5, 0.5]], [[-9.0]])
    (result,) = BmImageProcessor().post_process_object_detection(outputs, target_sizes=torch.tensor([[10, 10]]))
    assert {name: tuple(value.shape) for name, value in result.items()} == {
        "scores": (0,),
        "labels": (0,),
        "boxes": (0, 4),
    }
    with pytest.raises(ValueError, match="2 sizes for 1 images"):
        BmImageProcessor().post_process_object_detection(outputs, target_sizes=[(1, 1), (1, 1)])


def squares(count: int, size: int, seed: int) -> tuple[torch.Tensor, list[dict], list[torch.Tensor]]:
    """Black images with one bright square each, its class by its colour."""
    rng = random.Random(seed)
    pixels, labels, boxes = torch.zeros(count, 3, size, size), [], []
    for row in range(count):
        side, channel = rng.choice([12, 20, 28]), row % 3
        left, top = rng.randrange(size - side), rng.randrange(size - side)
        pixels[row, channel, top : top + side, left : left + side] = 1
        boxes.append(torch.tensor([[left, top, left + side, top + side]]).float())
        labels.append(label(boxes[-1], size, classes=[channel]))
    return pixels, labels, boxes


@pytest.mark.trains
def test_a_detector_learns_to_find_squares(training_seed):
    pixels, labels, boxes = squares(6, 48, training_seed)
    model = detector(fpn_size=32, strides=[2, 2, 2], num_feature_levels=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(pixels)
    results = BmImageProcessor().post_process_object_detection(outputs, threshold=0.4, target_sizes=[(48, 48)] * 6)
    for row, result in enumerate(results):
        assert result["labels"][0] == row % 3
        assert pairwise_iou(result["boxes"][:1], boxes[row]) > 0.7
