"""Anchor-free object detection.  B images, Q locations of all levels, K classes, C channels, N boxes of one image.

FCOS (Tian et al. 2019, arXiv:1904.01355) over a feature pyramid (Lin et al. 2017, arXiv:1612.03144) of the trunk's
last maps.  It follows the authors' later version (2020, arXiv:2006.09214) in three points: centre sampling, GIoU, and
centre-ness on the regression tower instead of the classification tower.  Distances are exp(scale * x) * stride.

The trunk must return `feature_maps`, a list of (B, C, H, W), and have `feature_strides` (pixels) and
`feature_channels` for each of them.
"""

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from .boxes_bm import assign_batch, centerness, centres, corners, grid_locations, overlap_of_distances
from .heads_bm import check_input

NUM_TRUNK_LEVELS = 3  # the paper's C3, C4 and C5
# A level of stride s predicts boxes whose farthest side is 4 s to 8 s away: up to 64, 128, ... pixels in the paper.
STRIDES_OF_RANGE = 8
PRIOR = 0.01  # initial probability of each class (Lin et al. 2017, arXiv:1708.02002)
GROUPS = 32  # groups of the group norms in the towers
LARGEST_EXPONENT = math.log(1000.0)  # keeps exp() finite


@dataclass
class DetectionOutput(ModelOutput):
    """`logits` (B, Q, K), `pred_boxes` (B, Q, 4) as (centre x, centre y, width, height) as fractions of the image
    size, `pred_centerness` (B, Q) before the sigmoid, the three terms of the loss, and
    `row_losses` and `row_items` (B,), losses and positive locations of each image, if they are asked for."""

    loss: torch.Tensor | None = None
    loss_dict: dict | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    pred_centerness: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    row_losses: torch.Tensor | None = None
    row_items: torch.Tensor | None = None


class FeaturePyramid(nn.Module):
    """Maps of increasing stride -> `num_levels` maps of one width, each with the information of the coarser ones."""

    def __init__(self, channels: list[int], width: int, num_levels: int):
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(inputs, width, 1) for inputs in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        num_extra = num_levels - len(channels)
        self.extra = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(num_extra))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        merged = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for i in reversed(range(len(merged) - 1)):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [smooth(x) for smooth, x in zip(self.smooth, merged, strict=True)]
        for i, conv in enumerate(self.extra):
            levels.append(conv(levels[-1] if i == 0 else levels[-1].relu()))
        return levels


def tower(width: int, depth: int) -> nn.Sequential:
    groups = math.gcd(GROUPS, width)
    layers = ((nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.ReLU()) for _ in range(depth))
    return nn.Sequential(*(layer for block in layers for layer in block))


class DetectionTowers(nn.Module):
    """Levels (B, C, H, W) -> class logits (B, Q, K), distances in strides (B, Q, 4), centre-ness (B, Q)."""

    def __init__(self, config):
        super().__init__()
        width = config.fpn_size
        self.classification = tower(width, config.num_detection_layers)
        self.regression = tower(width, config.num_detection_layers)
        self.class_logits = nn.Conv2d(width, config.num_labels, 3, padding=1)
        self.distances = nn.Conv2d(width, 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(config.num_feature_levels))

    def forward(self, levels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, distances, centre_logits = [], [], []
        for scale, x in zip(self.scales, levels, strict=True):
            regression = self.regression(x)
            logits.append(self.class_logits(self.classification(x)).flatten(2))
            distances.append((scale * self.distances(regression)).clamp(max=LARGEST_EXPONENT).exp().flatten(2))
            centre_logits.append(self.centerness(regression).flatten(2))
        by_location = [torch.cat(x, dim=2).transpose(1, 2) for x in (logits, distances, centre_logits)]
        return by_location[0], by_location[1], by_location[2].squeeze(-1)

    def reset(self) -> None:
        """Small weights and a low prior of all classes, or background locations dominate the loss at first."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init.normal_(module.weight, std=0.01)
        init.constant_(self.class_logits.bias, -math.log((1 - PRIOR) / PRIOR))
        init.ones_(self.scales)


class ObjectDetectionHead:
    """FCOS.  `labels` is a list of {"class_labels": (N,), "boxes": (N, 4)}, boxes as in `pred_boxes`.

    Every term of the loss is a sum divided by the number of positive locations, which depends on the labels alone.  If
    a batch is split (accumulation, processes), call `count_items` for every part and pass the total to each forward as
    `num_items_in_batch`; then every split gives the same gradient.  Without it, each forward divides by its own
    positives, as other implementations of FCOS do.  What `assign_locations` returns for an image may be kept in its
    label as "assigned", for the forward pass not to find it again.
    """

    main_input_name = "pixel_values"

    def __init__(self, config):
        check_input(config, type(self).__name__, "pixels")
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.used_maps = last_map_of_each_stride(self.model.feature_strides)[-config.num_feature_levels :]
        self.strides = [self.model.feature_strides[i] for i in self.used_maps]
        while len(self.strides) < config.num_feature_levels:
            self.strides.append(2 * self.strides[-1])
        channels = [self.model.feature_channels[i] for i in self.used_maps]
        self.pyramid = FeaturePyramid(channels, config.fpn_size, config.num_feature_levels)
        self.towers = DetectionTowers(config)
        self.shapes_of_size = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DetectionTowers):
            module.reset()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_row_losses: bool = False,
        **kwargs,
    ) -> DetectionOutput:
        """`output_row_losses`: also the sum of the losses of each image, not divided by anything, and its items."""
        outputs = self.model(pixel_values=pixel_values, **kwargs)
        levels = self.pyramid([outputs.feature_maps[i] for i in self.used_maps])
        logits, distances, centre_logits = self.towers(levels)
        shapes = [tuple(x.shape[-2:]) for x in levels]
        points, strides, _ = self.locations(shapes, logits.device)
        distances = distances.float() * strides[:, None]  # (B, Q, 4), pixels
        size = image_size(pixel_values)
        loss = terms = row_losses = row_items = None
        if labels is not None:
            classes, target_distances = self.targets(shapes, points, labels, size)
            losses = self.losses(logits, distances, centre_logits, classes, target_distances)
            row_items = (classes < self.config.num_labels).sum(1)
            num_items = row_items.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            terms = {name: values.sum() / num_items for name, values in losses.items()}
            loss = sum(terms.values())
            row_losses = sums_of_rows(losses, row_items) if output_row_losses else None
        boxes = torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)
        return DetectionOutput(
            loss=loss,
            loss_dict=terms,
            row_losses=row_losses,
            row_items=row_items if output_row_losses else None,
            logits=logits,
            pred_boxes=centres(boxes) / size.repeat(2),
            pred_centerness=centre_logits,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def locations(self, shapes, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Locations (Q, 2), strides (Q,) and allowed distances (Q, 2) of the farthest side, in pixels."""
        points, levels = grid_locations(shapes, self.strides, device)
        ranges = torch.tensor(list(pairwise(self.limits)), device=device)
        return points, torch.tensor(self.strides, device=device, dtype=torch.float32)[levels], ranges[levels]

    @property
    def limits(self) -> list[float]:
        """Of the distance to the farthest side, in pixels: below and above each level."""
        return [0.0, *(STRIDES_OF_RANGE * float(stride) for stride in self.strides[:-1]), math.inf]

    def targets(self, shapes, points, labels, size) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets of B images: the class of each location (B, Q), K for background, and its distances (B, Q, 4)."""
        classes = torch.cat([label["class_labels"] for label in labels]).to(points.device)
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < self.config.num_labels:
            raise ValueError(
                f"class_labels hold {int(classes.min())} to {int(classes.max())}; num_labels={self.config.num_labels} "
                f"allows 0 to {self.config.num_labels - 1}"
            )
        boxes, counts = self.boxes_in_pixels(labels, size)
        if all("assigned" in label for label in labels):
            index = torch.stack([label["assigned"] for label in labels]).to(points.device)
        else:
            index = self.assigned(shapes, boxes, counts)
        background = torch.full_like(index, self.config.num_labels)
        if len(classes) == 0:
            return background, points.new_zeros(*index.shape, 4)
        is_background = index < 0
        starts = [0, *accumulate(counts[:-1])]
        # Background of a last image without boxes would be beyond the last box.
        index = (index + torch.tensor(starts, device=index.device)[:, None]).clamp(0, len(classes) - 1)
        nearest = boxes[index]  # (B, Q, 4)
        distances = torch.cat((points - nearest[..., :2], nearest[..., 2:] - points), dim=-1)
        return torch.where(is_background, background, classes[index]), distances

    def assigned(self, shapes, boxes, counts) -> torch.Tensor:
        """Which box of its image each location (B, Q) predicts, -1 for background."""
        radius = self.config.center_sampling_radius
        return assign_batch(shapes, self.strides, self.limits, boxes, counts, radius=radius)

    def losses(self, logits, distances, centre_logits, classes, target_distances) -> dict[str, torch.Tensor]:
        """Focal loss of all locations (B, Q, K), GIoU (or IoU) and centre-ness losses of the positive ones (P,)."""
        positive = classes < self.config.num_labels  # (B, Q)
        one_hot = F.one_hot(classes, self.config.num_labels + 1)[..., :-1].float()
        focal = focal_loss(logits.float(), one_hot, alpha=self.config.focal_alpha, gamma=self.config.focal_gamma)
        wanted = target_distances[positive]
        iou, giou = overlap_of_distances(distances[positive], wanted)
        box_loss = 1 - giou if self.config.box_loss == "giou" else -iou.clamp(min=1e-6).log()
        centre_loss = F.binary_cross_entropy_with_logits(
            centre_logits[positive].float(), centerness(wanted), reduction="none"
        )
        return {"class": focal, "box": box_loss, "centerness": centre_loss}

    @torch.no_grad()
    def count_items(self, pixel_values: torch.Tensor, labels: list[dict[str, torch.Tensor]], **kwargs) -> torch.Tensor:
        """Number of positive locations of a batch, from its labels and the size of its images, without a forward."""
        return (self.assign_locations(pixel_values, labels) >= 0).sum()

    @torch.no_grad()
    def assign_locations(self, pixel_values: torch.Tensor, labels: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Which box of its image each location (B, Q) predicts, -1 for background; without a forward, too."""
        boxes, counts = self.boxes_in_pixels(labels, image_size(pixel_values))
        return self.assigned(self.level_shapes(pixel_values.shape[-2:]), boxes, counts)

    @staticmethod
    def boxes_in_pixels(labels, size) -> tuple[torch.Tensor, list[int]]:
        """Boxes (N, 4) of one image after the other as (left, top, right, bottom), and how many each image has."""
        boxes = [label["boxes"].view(-1, 4) for label in labels]
        every = torch.cat(boxes).to(size.device, torch.float32)
        return corners(every) * size.repeat(2), [len(of_image) for of_image in boxes]

    def level_shapes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of every level for images of this size, from a run on the meta device; cached."""
        size = tuple(size)
        if size not in self.shapes_of_size:
            with torch.device("meta"):
                trunk, pyramid = type(self.model)(self.config).eval(), self.pyramid
                maps = trunk(pixel_values=torch.empty(1, self.config.num_channels, *size)).feature_maps
            shapes = [tuple(maps[i].shape[-2:]) for i in self.used_maps]
            for _ in pyramid.extra:
                shapes.append(tuple((side + 1) // 2 for side in shapes[-1]))
            self.shapes_of_size[size] = shapes
        return self.shapes_of_size[size]


def image_size(pixel_values: torch.Tensor) -> torch.Tensor:
    """(width, height) in pixels."""
    return torch.tensor([pixel_values.shape[-1], pixel_values.shape[-2]], device=pixel_values.device).float()


def sums_of_rows(losses: dict[str, torch.Tensor], row_items: torch.Tensor) -> torch.Tensor:
    """The sum (B,) of the losses of each image, which has `row_items` (B,) positive locations."""
    of_positive = (losses["box"] + losses["centerness"]).split(row_items.tolist())
    return losses["class"].sum((1, 2)) + torch.stack([values.sum() for values in of_positive])


def last_map_of_each_stride(strides: list[int]) -> list[int]:
    """Indices of the deepest map of each stride, at most the three coarsest, without the map of the stem."""
    deepest = {stride: index for index, stride in enumerate(strides) if index}
    if not deepest:
        raise ValueError("object detection needs a trunk with at least one stage; give hidden_sizes a width")
    return sorted(deepest.values())[-NUM_TRUNK_LEVELS:]


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, *, alpha: float, gamma: float) -> torch.Tensor:
    """Sigmoid focal loss per element (Lin et al. 2017, arXiv:1708.02002, eq. 5); targets hold 0 and 1."""
    probability = logits.sigmoid()
    of_truth = probability * targets + (1 - probability) * (1 - targets)
    weight = (alpha * targets + (1 - alpha) * (1 - targets)) * (1 - of_truth) ** gamma
    return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


__all__ = ["DetectionOutput", "ObjectDetectionHead", "focal_loss"]
