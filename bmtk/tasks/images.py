"""What the tasks that read images share: an image processor, and images that are decoded when they are needed."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from bmtk.data.media import decode_image
from bmtk.data.tables import check_column

from .task import Task, setting


@dataclass
class ImageArguments:
    """Where the images are, and what is made of them."""

    image_column: str = setting("image", "column of the image")


class ImageTask(Task):
    """A task whose rows become `pixel_values`.  Its rows, as `read_rows` gives them, hold images undecoded."""

    unit = "images"
    inputs = ("image",)
    processor = None  # made for the model's configuration by `configure`

    def read_images(self, table: Dataset, where: str) -> list[dict]:
        """Undecoded images.  Raises: ValueError if the column is not there, or holds something else."""
        name = self.args.image_column
        check_column(table, name, option="image_column", where=where)
        values = list(table[name])
        for row, value in enumerate(values, 1):
            if not isinstance(value, dict) or not {"bytes", "path"} <= value.keys():
                raise ValueError(
                    f"image_column={name!r} of {where} row {row} holds a {type(value).__name__}, no image"
                )
        return values

    def configure(self, config, **options) -> None:
        """Make the processor: the model's own, or for a new model one of the size and channels of `config`."""
        self.processor = self.image_processor(config)
        super().configure(config, **options)

    def image_processor(self, config):
        """The model's own, or a new one; palettes and greys become red, green and blue unless it says otherwise."""
        processor = self._processor(config)
        if getattr(processor, "do_convert_rgb", False) is None:
            processor.do_convert_rgb = True
        return processor

    def _processor(self, config):
        if self.model is not None and (not Path(self.model).is_dir() or _has_processor(Path(self.model))):
            return AutoImageProcessor.from_pretrained(self.model, backend="pil", **self.loading)
        if type(config) not in IMAGE_PROCESSOR_MAPPING:
            raise ValueError(f"no image processor belongs to a {config.model_type}; is it a model of images?")
        processor_class = IMAGE_PROCESSOR_MAPPING[type(config)]["pil"]
        return processor_class.for_config(config) if hasattr(processor_class, "for_config") else processor_class()

    def image(self, value: dict, where: str):
        return decode_image(value, where)

    def pixels(self, images: list) -> torch.Tensor:
        """(B, C, H, W) of decoded images."""
        return self.processor(images, return_tensors="pt")["pixel_values"]

    def example_input(self) -> str:
        return "'an_image.png'"


class ImageRows(torch.utils.data.Dataset):
    """Rows whose image is decoded when it is asked for; errors name the row."""

    def __init__(self, rows: Dataset, where: str):
        self.rows, self.where = rows, where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.__getitems__([row])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        found = self.rows.select(indices) if len(indices) > 1 else [self.rows[indices[0]]]
        return [
            {**row, "image": decode_image(row["image"], f"the image of {self.where} row {index + 1}")}
            for index, row in zip(indices, found, strict=True)
        ]


def _has_processor(folder: Path) -> bool:
    return (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
