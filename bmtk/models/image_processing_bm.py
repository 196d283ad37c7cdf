"""Image processor on Pillow and numpy: depth, resize, crop, greyscale, normalize, and the boxes of detectors.

Transparent images are composited on white.  Images of more than 8 bits (Pillow's I;16, I and F, numpy's uint16) are
read between `image_range`, the values that are black and white; by default those of 16 bits.

B images, Q locations, K classes.  The weights of red, green and blue are Pillow's own (ITU-R BT.601).
"""

import numpy as np
import PIL.Image
import torch
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .boxes_bm import corners, non_maximum_suppression

NUM_CANDIDATES = 1000  # boxes of an image that non-maximum suppression considers, best first (FCOS, section 4)
LUMINANCE = np.array([19595, 38470, 7471]) / 65536  # of red, green and blue


class BmImageProcessorKwargs(ImagesKwargs, total=False):
    """do_convert_grayscale (`bool`, *optional*): one channel, the luminance, instead of three.
    image_range (`list[float]`, *optional*): the values of images of more than 8 bits that are black and white."""

    do_convert_grayscale: bool
    image_range: list[float]


class BmImageProcessor(PilBackend):
    """Pixels for every image head, and `post_process_object_detection`."""

    valid_kwargs = BmImageProcessorKwargs
    resample = PILImageResampling.BILINEAR
    size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = False
    do_convert_rgb = True
    do_convert_grayscale = False
    image_range = None
    do_rescale = True
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    @classmethod
    def for_config(cls, config, **overrides) -> "BmImageProcessor":
        """The processor for a configuration: its image size, and one channel or three."""
        if config.num_channels not in (1, 3):
            raise ValueError(f"num_channels={config.num_channels} is neither greyscale (1) nor colour (3)")
        fields = {"size": {"height": config.image_size, "width": config.image_size}}
        if config.num_channels == 1:
            fields |= {"do_convert_grayscale": True, "image_mean": [0.5], "image_std": [0.5]}
        return cls(**{**fields, **overrides})

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        """Read 2-D arrays, a common format of greyscale images, as images of one channel."""
        if isinstance(images, (list, tuple)):
            images = [with_channel(image) for image in images]
        return super()._prepare_images_structure(with_channel(images), expected_ndims)

    def process_image(
        self, image, do_convert_rgb=None, do_convert_grayscale=None, image_range=None, **kwargs
    ) -> np.ndarray:
        image = in_eight_bits(image, image_range)
        if isinstance(image, PIL.Image.Image) and image.has_transparency_data:
            image = on_white(image)
        if do_convert_grayscale:
            do_convert_rgb = False
            if isinstance(image, PIL.Image.Image):
                if image.has_transparency_data:  # on white, like colour images
                    image = PIL.Image.fromarray(self.convert_to_rgb(image))
                image = image.convert("L")
        image = super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)  # (channels, height, width)
        if not do_convert_grayscale or image.shape[0] == 1:
            return image
        grey = np.tensordot(LUMINANCE, image[:3], axes=1)[None]
        return (grey.round() if np.issubdtype(image.dtype, np.integer) else grey).astype(image.dtype)

    def resize(self, image: np.ndarray, size, *args, **kwargs) -> np.ndarray:
        """Keep an image of 8 bits (C, H, W) that has its size already: Pillow would make a copy of it."""
        if image.dtype == np.uint8 and image.shape[-2:] == (size.height, size.width):
            return image
        return super().resize(image, size, *args, **kwargs)

    def preprocess(self, images, annotations=None, **kwargs) -> BatchFeature:
        """`pixel_values`, and from `annotations` the `labels` of a detector.

        An annotation is COCO's: {"image_id", "annotations": [{"bbox": [left, top, width, height] in pixels,
        "category_id", "iscrowd"}]}; the pixels of an image that was resized before are those of its "boxes_size"
        (height, width), if it has one.  A label is {"class_labels": (N,), "boxes": (N, 4)}, boxes as (centre x,
        centre y, width, height) as fractions of the image size; crowds and empty boxes are omitted.
        """
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if kwargs.keys() <= {"return_tensors"} and self._are_ready(images):
            settings = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
            pixels = [np.asarray(image).transpose(2, 0, 1) for image in images]
            return self._preprocess(pixels, annotations, **{**settings, "do_resize": False, **kwargs})
        return super().preprocess(images, annotations, **kwargs)

    def _are_ready(self, images) -> bool:
        """Whether these are colour images of Pillow's that have their size: their values alone are left to change.

        The checks and conversions of the base class would take as long as that.
        """
        if self.do_center_crop or self.do_pad or self.do_convert_grayscale:
            return False
        size = dict(self.size)
        wanted = size.get("width"), size.get("height")
        return (
            isinstance(images, list)
            and bool(images)
            and all(isinstance(image, PIL.Image.Image) for image in images)
            and {(image.mode, image.size, image.has_transparency_data) for image in images} == {("RGB", wanted, False)}
        )

    def _preprocess(self, images, annotations, **kwargs) -> BatchFeature:
        features = self._features(images, **kwargs)
        if annotations is None:
            return features
        if len(annotations) != len(images):
            raise ValueError(f"{len(images)} images came with {len(annotations)} annotations; pass one for each")
        if kwargs.get("do_center_crop") or kwargs.get("do_pad"):
            raise ValueError("do_center_crop and do_pad would move boxes; with annotations set both to False")
        labels = [label_of(a, *boxes_size(a, image)) for a, image in zip(annotations, images, strict=True)]
        features["labels"] = [BatchFeature(label, tensor_type=kwargs.get("return_tensors")) for label in labels]
        return features

    def _features(self, images, **kwargs) -> BatchFeature:
        """What the base class makes of images; if all are of one kind, of eight bits, by a table of their values."""
        steps, kinds = ("do_rescale", "do_normalize"), {(image.dtype.name, len(image)) for image in images}
        if kwargs.get("do_pad") or not all(map(kwargs.get, steps)) or kinds not in ({("uint8", 1)}, {("uint8", 3)}):
            return super()._preprocess(images, **kwargs)
        plain = super()._preprocess(images, **{**kwargs, **dict.fromkeys(steps, False), "return_tensors": None})
        ramp = np.tile(np.arange(256, dtype=np.uint8), (len(images[0]), 1))[..., None]  # (C, 256, 1): an image
        ramp = self.rescale(ramp, kwargs["rescale_factor"])
        table = self.normalize(ramp, kwargs["image_mean"], kwargs["image_std"])[..., 0]
        images, tensors = plain["pixel_values"], kwargs["return_tensors"]
        found = [np.empty(image.shape, table.dtype) for image in images]
        if tensors is not None and len({image.shape for image in images}) == 1:
            # Becomes a tensor without a copy; torch's memory begins where convolutions read it faster.
            found = torch.from_numpy(table).new_empty((len(images), *images[0].shape)).numpy()
        for channels, image in zip(found, images, strict=True):
            for value_of, channel, values in zip(table, channels, image, strict=True):
                np.take(value_of, values, out=channel, mode="clip")  # with "raise", the default, it makes a copy
        return BatchFeature({"pixel_values": found}, tensor_type=tensors)

    def post_process_object_detection(
        self, outputs, threshold: float = 0.5, target_sizes=None, nms_threshold: float = 0.6, max_detections: int = 100
    ) -> list[dict[str, torch.Tensor]]:
        """{"scores" (n,), "labels" (n,), "boxes" (n, 4)} of every image, best first.

        A score is the geometric mean of class probability and centre-ness.  Boxes are (left, top, right, bottom), in
        pixels of `target_sizes`, (height, width) of each image, or without them as fractions of its size.  Boxes
        that overlap a better one of their class by more than `nms_threshold` (intersection over union) are removed.
        """
        scores = (outputs.logits.float().sigmoid() * outputs.pred_centerness.float().sigmoid()[..., None]).sqrt()
        boxes = corners(outputs.pred_boxes.float()).clamp(0, 1)
        if target_sizes is not None and len(target_sizes) != len(boxes):
            raise ValueError(f"target_sizes has {len(target_sizes)} sizes for {len(boxes)} images; pass one for each")
        results = []
        for index in range(len(boxes)):
            result = best_boxes(scores[index], boxes[index], threshold, nms_threshold, max_detections)
            if target_sizes is not None:
                height, width = (float(side) for side in target_sizes[index])
                result["boxes"] = result["boxes"] * result["boxes"].new_tensor([width, height, width, height])
            results.append(result)
        return results


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image composited on white; Pillow's own conversion shows the arbitrary colour of transparent pixels."""
    image = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")


def in_eight_bits(image, image_range):
    """An image of more than 8 bits in 8, black and white at the ends of `image_range`; another one as it is."""
    is_float = isinstance(image, PIL.Image.Image) and image.mode == "F"
    is_whole = isinstance(image, PIL.Image.Image) and image.mode.startswith("I")
    if not (is_float or is_whole or (isinstance(image, np.ndarray) and image.dtype == np.uint16)):
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=-np.inf, neginf=-np.inf, posinf=np.inf)
    low, high = image_range or (0, 65535)
    if image_range is None and (is_float or values.min() < low or values.max() > high):
        raise ValueError(
            f"an image of mode {image.mode} holds values from {values.min():g} to {values.max():g}; pass image_range, "
            "the values that are black and white"
        )
    values = ((values.clip(low, high) - low) / (high - low) * 255).round().astype(np.uint8)
    return PIL.Image.fromarray(values) if isinstance(image, PIL.Image.Image) else values


def with_channel(image):
    return image[None] if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2 else image


def best_boxes(scores, boxes, threshold: float, nms_threshold: float, max_detections: int) -> dict[str, torch.Tensor]:
    """The best of scores (Q, K) and boxes (Q, 4) after threshold and non-maximum suppression, best first."""
    location, label = (scores > threshold).nonzero(as_tuple=True)
    best, order = scores[location, label].topk(min(NUM_CANDIDATES, len(location)))
    location, label = location[order], label[order]
    limits = {"iou_threshold": nms_threshold, "limit": max_detections}
    kept = non_maximum_suppression(boxes[location], best, label, **limits)
    return {"scores": best[kept], "labels": label[kept], "boxes": boxes[location[kept]]}


def boxes_size(annotation: dict, image: np.ndarray) -> tuple[int, int]:
    """The (height, width) that boxes are in pixels of; for None, which tables fill in, the image's own."""
    size = annotation.get("boxes_size")
    height, width = image.shape[-2:] if size is None else size
    if not (height > 0 and width > 0):
        raise ValueError(
            f"boxes_size={size} of an annotation is no size; give (height, width) in pixels, or leave it out"
        )
    return height, width


def label_of(annotation: dict, height: int, width: int) -> dict[str, np.ndarray]:
    """One image's COCO annotation as a label, for an image of this size in pixels."""
    objects = [entry for entry in annotation["annotations"] if not entry.get("iscrowd")]
    boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
    classes = np.array([entry["category_id"] for entry in objects], dtype=np.int64)
    size = np.array([width, height], dtype=np.float32)
    low, high = boxes[:, :2].clip(0, size), (boxes[:, :2] + boxes[:, 2:]).clip(0, size)
    kept = (high > low).all(-1)
    boxes = np.concatenate(((low + high) / 2 / size, (high - low) / size), axis=-1)
    return {"class_labels": classes[kept], "boxes": boxes[kept], "orig_size": np.array([height, width])}


__all__ = ["BmImageProcessor"]
