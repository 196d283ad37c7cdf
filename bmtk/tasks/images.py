"""What the tasks that read images share: an image processor, and rows that are decoded when needed, or once for all.

B images, C channels, H x W pixels.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from transformers import AutoImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from bmtk.data.epoch_dataset import EpochDataset
from bmtk.data.image_depth import eight_bits, flat_share, is_deep, range_of
from bmtk.data.image_transforms import Augmentation
from bmtk.data.media import ON_CORRUPT, decode_image, image_header, in_colour, media_column
from bmtk.data.tables import check_column
from bmtk.errors import UserError
from bmtk.settings import fact, setting

from .objective import Objective
from .task_data import SourceArguments, TaskData

SURVEYED = 1000  # rows whose sizes and kinds are noted, and whose pixels are averaged where not all are in memory
AT_ONCE = 32  # images that are decoded together: they may be of any size
LOOKED_AT = 100  # training images, at most, that are looked at for whether they show anything
KINDS = {
    **{"1": "black and white", "L": "greyscale", "P": "palette", "RGB": "colour", "RGBA": "colour"},  # PIL's modes
    **{"I;16": "16-bit greyscale", "I;16B": "16-bit greyscale", "I": "32-bit greyscale", "F": "greyscale of floats"},
}


@dataclass
class ImageArguments(SourceArguments):
    """Where the images are, and what is made of them."""

    image_column: str = fact("image", "column of the image")
    image_range: list[float] | None = fact(
        None,
        "values that are black and white in images of more than 8 bits (0 4095 of a 12-bit camera); default: found in "
        "the data, and kept with the model",
    )
    on_corrupt: str = setting("stop", "images that cannot be read: stop, or skip (leave their rows out, with a note)")
    cache_megabytes: int = setting(
        1024, "megabytes of memory: a split's images are decoded once if they fit into it, else every time"
    )

    # Memory changes no result.
    free_keys: ClassVar[frozenset[str]] = SourceArguments.free_keys | {"cache_megabytes"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_corrupt not in ON_CORRUPT:
            raise UserError(f"on_corrupt={self.on_corrupt!r} is unknown; choose one of {', '.join(ON_CORRUPT)}")
        if self.image_range is not None and (len(self.image_range) != 2 or self.image_range[0] >= self.image_range[1]):
            raise UserError(f"image_range={self.image_range} must be two numbers, black and white, such as 0 4095")


@dataclass
class AugmentedImageArguments(ImageArguments):
    """Also what is done to each image in training; evaluation sees them as they are."""

    random_crop: int = setting(
        0, "training images move by up to this many pixels along each side, mirrored at the edges"
    )
    horizontal_flip: bool = fact(False, "mirror every second training image")
    rand_augment: int = setting(0, "transformations of each training image, drawn from 14 (RandAugment)")
    rand_augment_magnitude: float = setting(0.3, "their strength, from 0 to 1")
    colour_jitter: float = setting(0.0, "brightness, contrast and saturation change by up to this share")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augmentation = Augmentation(
            **{f.name: getattr(self, f.name) for f in fields(Augmentation) if f.name in vars(self)}
        )


class ImageData(TaskData):
    """Rows of undecoded images."""

    inputs = ("image",)

    def readable_rows(self, table: Dataset, where: str) -> Dataset:
        return rows_with_images(table, where, self.args, self.notes)

    def read_images(self, table: Dataset, where: str) -> Dataset:
        return undecoded_images(table, where, self.args.image_column)

    @property
    def has_processor(self) -> bool:
        """Whether the model brings an image processor."""
        return has_image_processor(self.model)


class ImageObjective(Objective):
    """Rows become `pixel_values`."""

    data: ImageData

    def __init__(self, data: ImageData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config, labels=labels)
        self.image_processor = image_processor_for(config, data.model, **data.loading)
        self.image_range = find_range(data, self.image_processor)
        self._scale: np.ndarray | None = None  # (C, 256): what each value of a pixel becomes, made on first use

    @property
    def processor(self) -> Any:
        return self.image_processor

    def pixel_rows(self, rows: Dataset, where: str) -> "PixelRows":
        """Rows with `pixels`, decoded at once if a split fits into memory; those of training augmented."""
        limit = 0 if where == "input" else self.args.cache_megabytes * 10**6
        is_augmented = where == "train" and self.args.augmentation != Augmentation()
        augmentation = self.args.augmentation if is_augmented else None
        images = ImageRows(rows, where, self.image_range)
        found = PixelRows(images, self.resized, limit=limit, augmentation=augmentation, seed=self.data.seed)
        if where == "train":
            self.notes += [survey(rows, found.shape), found.whereabouts, *flatness(images)]
        return found

    def resized(self, images: list[Any]) -> np.ndarray:
        """(B, C, H, W), uint8: what the processor makes of decoded images before it rescales and normalises them.

        Images are converted to colour first, as pipelines do: most processors leave a greyscale image one channel.
        One that makes them grey again gets the same values without it.
        """
        is_grey = getattr(self.image_processor, "do_convert_grayscale", False)
        images = [image if is_grey and image.mode == "L" else in_colour(image) for image in images]
        found = self.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels: np.ndarray = found["pixel_values"]
        return pixels

    def scaled(self, pixels: np.ndarray) -> torch.Tensor:
        """(B, C, H, W), float32: the rest of the processor's work, looked up value by value."""
        if self._scale is None:
            ramp = np.tile(np.arange(256, dtype=np.uint8), (pixels.shape[1], 1))[..., None]  # (C, 256, 1): an image
            steps = dict.fromkeys(("do_resize", "do_center_crop", "do_pad", "do_convert_rgb"), False)
            image = self.image_processor(ramp, **steps, input_data_format="channels_first", return_tensors="np")
            self._scale = image["pixel_values"][0, ..., 0].astype(np.float32)
        channels = [table[pixels[:, channel]] for channel, table in enumerate(self._scale)]
        return torch.from_numpy(np.stack(channels, axis=1))

    def normalise_by(self, rows: "PixelRows") -> None:
        """Let the processor of a new model normalise by mean and standard deviation of the pixels in `rows`."""
        mean, deviation = rows.statistics()
        self.image_processor.image_mean, self.image_processor.image_std, self._scale = mean, deviation, None
        self.notes.append(f"pixels are normalised by those of the training images: mean {mean}, deviation {deviation}")

    def next_command(self, directory: Path) -> str:
        """`pipeline` on an image of the data; where images lie in tables, their evaluation: both run as they stand."""
        if self._example_path() is None:
            return f"accelerate launch recipes/evaluate.py --model {directory}"
        return super().next_command(directory)

    def example_input(self) -> str:
        return repr(self._example_path() or "an_image.png")

    def _example_path(self) -> str | None:
        """The file of the first image that is measured on, if it has a file whose name needs no quoting."""
        rows = self.rows.get("test", self.rows.get("validation"))
        while rows is not None and not isinstance(rows, Dataset):
            rows = getattr(rows, "rows", None)
        image = rows[0].get("image") if rows else None
        path = image.get("path") if isinstance(image, dict) else None
        return path if path and re.fullmatch(r"[\w./ -]+", path) and Path(path).is_file() else None


def rows_with_images(table: Dataset, where: str, args: ImageArguments, notes: list[str]) -> Dataset:
    """The rows whose image can be read, if unreadable ones are to be skipped; a note counts those."""
    if args.on_corrupt != "skip":
        return table
    bad = {}
    for row, value in enumerate(undecoded_images(table, where, args.image_column)["image"]):
        try:
            decode_image(value, f"{where} row {row + 1}")
        except ValueError as error:
            bad[row] = str(error)
    if not bad:
        return table
    if len(bad) == len(table):
        raise UserError(f"no image of the {where} data can be read: {bad[0]}")
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    notes.append(f"{len(bad):,} of {len(table):,} rows left out: {'; '.join(list(bad.values())[:3])}{more}")
    return table.select([row for row in range(len(table)) if row not in bad])


def undecoded_images(table: Dataset, where: str, column: str) -> Dataset:
    """The column "image" of a table.  Raises: UserError if there is no such column, or it holds something else."""
    check_column(table, column, option="image_column", where=where)
    return media_column(table, column, "image", where)


def has_image_processor(model: str | None) -> bool:
    """Whether a model, a folder or Hub id, brings an image processor."""
    return model is not None and (not Path(model).is_dir() or _has_processor(Path(model)))


def image_processor_for(config: PreTrainedConfig, model: str | None, **loading: Any) -> Any:
    """That of `model`, or a new one for the size and channels of `config`.

    Palettes and greys become red, green and blue unless it is set otherwise.
    """
    processor = _image_processor(config, model, **loading)
    if getattr(processor, "do_convert_rgb", False) is None:
        processor.do_convert_rgb = True
    return processor


def _image_processor(config: PreTrainedConfig, model: str | None, **loading: Any) -> Any:
    if has_image_processor(model):
        # By name, because with torchvision installed transformers would choose that one, whose resizing differs.
        return AutoImageProcessor.from_pretrained(model, backend="pil", **loading)
    if type(config) not in IMAGE_PROCESSOR_MAPPING:
        raise UserError(f"no image processor belongs to a {config.model_type}; is it a model of images?")
    backends: Any = IMAGE_PROCESSOR_MAPPING[type(config)]  # annotated as a tuple, but it is a dict
    processor_class = backends["pil"]
    if hasattr(processor_class, "for_config"):
        return processor_class.for_config(config)
    side, sizes = getattr(config, "image_size", None), processor_class.size or {}
    fits = isinstance(side, int) and {"height", "width"} <= dict(sizes).keys()
    return processor_class(size={"height": side, "width": side}) if fits else processor_class()


def find_range(data: TaskData, processor: Any) -> list[float] | None:
    """Black and white of images of more than 8 bits, as set, as the model was trained, or as found in the rows.

    What is found is kept in `processor`, so that the saved one makes the same of them.
    """
    trained = getattr(processor, "image_range", None)
    found: list[float] | None = data.args.image_range or trained
    if found is None:
        deep = (value for rows in data.rows.values() for value in _spread(rows) if _is_deep(value))
        of_data = range_of(decode_image(value, "an image of more than 8 bits") for value in deep)
        if of_data is None:
            return None
        (low, high), reason = of_data
        data.notes.append(
            f"images of more than 8 bits hold {reason}: {low:g} is read as black and {high:g} as white (image_range); "
            "pipelines of transformers cut them off at 255 before the processor sees them: use recipes/predict.py"
        )
        found = [low, high]
    processor.image_range = list(found)
    return found


def _is_deep(value: dict[str, Any]) -> bool:
    """Of an image that can be read; others are reported where they are decoded."""
    try:
        return is_deep(image_header(value)[1])
    except (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError):
        return False


def _spread(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The images of up to `SURVEYED` rows from all over, one after the other."""
    images = rows.select_columns("image")
    return (images[row]["image"] for row in spread_rows(len(rows), SURVEYED))


def spread_rows(count: int, most: int) -> list[int]:
    """Up to `most` of `count` rows, from all over."""
    return [int(row) for row in np.linspace(0, count - 1, min(count, most))]


def flatness(rows: "ImageRows") -> list[str]:
    """A warning if at least half of the images show next to nothing."""
    chosen = spread_rows(len(rows), LOOKED_AT)
    share = flat_share(np.asarray(in_colour(rows.images([row])[0]["image"])) for row in chosen)
    if share < 0.5:
        return []
    return [
        f"{share:.0%} of the {rows.where} images looked at are nearly of one colour (their pixels deviate by less "
        "than 2 of 255): look at some of them; images of more than 8 bits may need image_range"
    ]


class ImageRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows whose image is decoded when it is asked for, in 8 bits; errors name the row.

    Decoded images are kept until they take `limit` bytes.
    """

    def __init__(self, rows: Dataset, where: str, image_range: Sequence[float] | None = None, *, limit: int = 0):
        self.rows, self.where, self.image_range = rows, where, image_range
        self.undecoded = rows.select_columns("image")
        self.others = {name: rows[name][:] for name in rows.column_names if name != "image"}
        self.kept: dict[int, PIL.Image.Image] = {}
        self.bytes_left = limit

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.images(indices)

    def images(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Rows as they are, whatever a subclass makes of them in training; their images are not to be changed."""
        missing = [index for index in dict.fromkeys(indices) if index not in self.kept]
        values = self.undecoded[missing]["image"] if missing else []
        decoded = {index: self._decoded(value, index) for index, value in zip(missing, values, strict=True)}
        return [
            {"image": self.kept[index] if index in self.kept else decoded[index], **self.others_of(index)}
            for index in indices
        ]

    def others_of(self, index: int) -> dict[str, Any]:
        """The columns of a row but for its image."""
        return {name: values[index] for name, values in self.others.items()}

    def _decoded(self, value: dict[str, Any], index: int) -> PIL.Image.Image:
        where = f"the image of {self.where} row {index + 1}"
        image = eight_bits(decode_image(value, where), self.image_range, where)
        num_bytes = image.width * image.height * len(image.getbands())
        if num_bytes <= self.bytes_left:
            self.kept[index], self.bytes_left = image, self.bytes_left - num_bytes
        return image


class PixelRows(EpochDataset, torch.utils.data.Dataset[dict[str, Any]]):
    """Rows with "pixels" (C, H, W), uint8, and every other column of `rows`.

    They are kept in memory if all of them take no more than `limit` bytes.  Augmented is a row only from the first
    `set_epoch` on, which training alone calls; what it becomes is then a function of (seed, epoch, row).  A row that
    is mixed has the row that it is mixed with as "other" (its columns), and its own "share".
    """

    first_epoch = -1

    def __init__(
        self,
        rows: ImageRows,
        resized: Callable[[list[Any]], np.ndarray],
        *,
        limit: int = 0,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        """`resized` makes pixels (B, C, H, W), uint8, of decoded images."""
        self.rows, self.resized = rows, resized
        self.augmentation, self.seed = augmentation, seed
        first = self._decoded([0])
        self.shape, self.num_bytes = first.shape[1:], first.nbytes * len(self)
        self.kept = self._all() if self.num_bytes <= limit else None

    def _all(self) -> np.ndarray:
        kept = np.empty((len(self), *self.shape), dtype=np.uint8)
        for start in range(0, len(self), AT_ONCE):
            indices = range(start, min(start + AT_ONCE, len(self)))
            kept[indices.start : indices.stop] = self._decoded(indices)
        return kept

    def _decoded(self, indices: Sequence[int]) -> np.ndarray:
        return self.resized([row["image"] for row in self.rows.__getitems__(indices)])

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """(B, C, H, W), as they are without augmentation."""
        return self._decoded(indices) if self.kept is None else self.kept[list(indices)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        if self.augmentation is None or self.epoch < 0:
            return [self._row(index, pixels) for index, pixels in zip(indices, self.pixels(indices), strict=True)]
        return [self._augmented(index, self.augmentation) for index in indices]

    def _row(self, index: int, pixels: np.ndarray) -> dict[str, Any]:
        return {"pixels": pixels, **self.rows.others_of(index)}

    def _augmented(self, index: int, augmentation: Augmentation) -> dict[str, Any]:
        pixels, draw = self._changed(index, augmentation)
        if not augmentation.mixes:
            return self._row(index, pixels)
        partner = int(draw.integers(len(self)))
        other, _ = self._changed(partner, augmentation)
        pixels, share = augmentation.mixed(pixels, other, draw)
        return {**self._row(index, pixels), "other": self._row(partner, other), "share": share}

    def _changed(self, index: int, augmentation: Augmentation) -> tuple[np.ndarray, np.random.Generator]:
        draw = np.random.default_rng((self.seed, self.epoch, index))
        return augmentation(self.pixels([index])[0], draw), draw

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, where 1 is white; of a part of the rows if not all are kept."""
        chosen = spread_rows(len(self), SURVEYED if self.kept is None else len(self))
        counts = np.zeros((self.shape[0], 256), dtype=int)
        for start in range(0, len(chosen), AT_ONCE):
            part = self.pixels(chosen[start : start + AT_ONCE])
            counts += np.stack([np.bincount(channel.ravel(), minlength=256) for channel in part.swapaxes(0, 1)])
        values, shares = np.arange(256) / 255, counts / counts.sum(1, keepdims=True)
        mean = shares @ values
        deviation = np.sqrt((shares * (values - mean[:, None]) ** 2).sum(1))
        deviation = deviation.clip(1 / 255)  # of images of one colour: it divides
        return mean.round(4).tolist(), deviation.round(4).tolist()

    @property
    def whereabouts(self) -> str:
        """Where the pixels are kept, in a sentence."""
        size = f"{self.num_bytes / 1e6:,.1f} MB"
        if self.kept is not None:
            return f"the {len(self):,} {self.rows.where} images are decoded once and kept in memory ({size})"
        return f"the {self.rows.where} images would take {size}: they are decoded every time (cache_megabytes)"


def survey(rows: Dataset, shape: Sequence[int]) -> str:
    """Sizes and kinds of up to `SURVEYED` images from all over, and what the model's size (C, H, W) does to them."""
    sizes, modes, are_clear = zip(*map(image_header, _spread(rows)), strict=True)
    kinds = Counter(KINDS.get(mode, mode) for mode in modes).most_common()
    parts = [", ".join(f"{count / len(sizes):.1%} {kind}" if len(kinds) > 1 else kind for kind, count in kinds)]
    if any(are_clear):
        parts.append(f"{sum(are_clear) / len(sizes):.1%} partly transparent, put on white (which pipelines do not do)")
    (width, height), (_, model_height, model_width) = np.median(sizes, axis=0).astype(int), shape
    if len(set(sizes)) > 1:
        parts.append(f"{min(sizes)[0]} to {max(sizes)[0]} pixels wide, mostly about {width} x {height}")
    else:
        parts.append(f"{width} x {height} pixels")
    larger = sum(w > model_width or h > model_height for w, h in sizes) / len(sizes)
    smaller = sum(w < model_width and h < model_height for w, h in sizes) / len(sizes)
    if larger or smaller:
        shares = f"{larger:.1%} are made smaller and {smaller:.1%} larger"
        parts.append(f"the model reads {model_width} x {model_height}: {shares}")
    looked_at = "" if len(sizes) == len(rows) else f" ({len(sizes):,} of {len(rows):,} looked at)"
    return f"training images{looked_at}: {'; '.join(parts)}"


def _has_processor(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
