"""Masked image modelling: paint hidden cells of an image (SimMIM: Xie et al. 2022, arXiv:2111.09886).  No labels.

Loss: mean absolute error of the pixels in hidden cells, as the model reads them.  In measurements the hidden cells are
the same every time, whatever the run's seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForMaskedImageModeling, PreTrainedConfig

from bmtk.data.epoch_dataset import EpochDataset
from bmtk.data.masking import hidden_cells
from bmtk.data.row_draws import row_draws
from bmtk.errors import UserError
from bmtk.settings import setting

from .figures import as_png, new_figure
from .images import AugmentedImageArguments, ImageData, ImageObjective, PixelRows
from .scorer import Scorer, mean_loss
from .task import Prediction, Task
from .task_data import DataArguments

MEASURED_SEED = 0  # of the masks of validation and test rows
SHOWN = 6  # images of a split that the report shows
STAGES = ("image", "seen", "painted")


@dataclass
class MaskedImageModelingArguments(AugmentedImageArguments, DataArguments):
    """Which images, what is done to them in training, and how much of them is hidden."""

    _argument_group_name = "data of masked_image_modeling"

    mask_ratio: float = setting(0.6, "share of an image's cells that are hidden")
    mask_cell_size: int | None = setting(
        None, "pixels per side of a cell that is hidden or seen; default: of one position of the model"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio={self.mask_ratio} is not a share; choose between 0 and 1")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        """Also fields of the architecture: metrics depend on how large the images are that the model reads."""
        names = ("mask_ratio", "mask_cell_size", "image_size")
        of_cells = {} if self.mask_cell_size else {"patch_size": "is the size of a hidden cell; set mask_cell_size"}
        of_masks = dict.fromkeys(names, "decides which pixels are to be painted")
        return {**super().settings_that_change(metric), **of_masks, **of_cells}


class MaskedImageModelingData(ImageData):
    """Column "image" (undecoded)."""

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        return self.read_images(table, where)

    @property
    def config_fields(self) -> dict[str, object]:
        return {**super().config_fields, "input_type": "pixels"}


class MaskedImageModelingObjective(ImageObjective):
    """Images become `pixel_values`, and `bool_masked_pos` (B, M) is true at hidden cells."""

    data: MaskedImageModelingData

    def __init__(self, data: MaskedImageModelingData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        super().__init__(data, config)
        self.num_cells = num_cells(config, data.args.mask_cell_size)

    def encode(self, rows: Dataset, where: str) -> "MaskedImages":
        seed = self.data.seed if where == "train" else MEASURED_SEED
        shown = () if where == "train" else np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)
        options = {"ratio": self.args.mask_ratio, "seed": seed, "shown": shown}
        return MaskedImages(self.pixel_rows(rows, where), self.num_cells, **options)

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            hidden = torch.from_numpy(np.stack([row["hidden"] for row in rows])).bool()
            pixels = np.stack([row["pixels"] for row in rows])
            batch = {"pixel_values": self.scaled(pixels), "bool_masked_pos": hidden}
            if "is_shown" in rows[0]:
                batch["is_shown"] = torch.tensor([row["is_shown"] for row in rows])
            return batch

        return collate

    def num_items(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Hidden cells of a batch."""
        count: torch.Tensor = batch["bool_masked_pos"].sum()
        return count

    def num_units(self, batch: Mapping[str, Any]) -> int:
        return len(batch["pixel_values"])

    def normalisation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Standard deviation and mean (C, 1, 1) by which the processor has normalised pixel_values."""
        processor = self.image_processor
        if not getattr(processor, "do_normalize", False):
            return torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        return torch.tensor(processor.image_std)[:, None, None], torch.tensor(processor.image_mean)[:, None, None]


class MaskedImageModelingScorer(Scorer):
    """To predict is to paint the hidden cells; a prediction is how far off the colours are."""

    objective: MaskedImageModelingObjective
    metrics = ("loss", "mae")

    def predict(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> list[Prediction]:
        """Errors of the hidden pixels, as painted and as the mean colour of the visible ones.

        `loss` is in the units of pixel_values; `error` and `mean_colour_error` in parts of the range of a pixel.
        Predictions for images that the report shows have a `picture`.
        """
        pixels, cells = batch["pixel_values"].float(), batch["bool_masked_pos"]
        painted = model(pixel_values=batch["pixel_values"], bool_masked_pos=cells).reconstruction.float()
        hidden = pixels_of(cells, pixels)  # (B, 1, H, W)
        mean_colour = (pixels * ~hidden).sum((2, 3), keepdim=True) / (~hidden).sum((2, 3), keepdim=True)
        std, mean = (value.to(pixels) for value in self.objective.normalisation())
        losses = mean_error(painted, pixels, hidden) * cells.sum(1)
        errors = mean_error(painted * std, pixels * std, hidden)
        baselines = mean_error((mean_colour * std).expand_as(pixels), pixels * std, hidden)
        predictions = [
            {"loss": loss, "items": items, "error": error, "mean_colour_error": baseline}
            for loss, items, error, baseline in zip(
                losses.tolist(), cells.sum(1).tolist(), errors.tolist(), baselines.tolist(), strict=True
            )
        ]
        for row in batch["is_shown"].nonzero()[:, 0].tolist() if "is_shown" in batch else ():
            seen = torch.where(hidden[row], 0.5, pixels[row] * std + mean)
            stages = (pixels[row] * std + mean, seen, torch.where(hidden[row], painted[row], pixels[row]) * std + mean)
            predictions[row]["picture"] = [as_image(stage) for stage in stages]
        return predictions

    def score(self, predictions: Sequence[Prediction], rows: Any) -> dict[str, float]:
        """Loss, and mean absolute error in parts of a pixel's range: of the model, and of each image's mean colour."""
        items = np.array([p["items"] for p in predictions])

        def mean(name: str) -> float:
            return float(np.average([p[name] for p in predictions], weights=items))

        return {"loss": mean_loss(predictions), "mae": mean("error"), "mean_colour_mae": mean("mean_colour_error")}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {
            "prediction": round(prediction["error"], 6),
            "mean_colour_error": round(prediction["mean_colour_error"], 6),
        }

    def figures(self, predictions: Sequence[Prediction], rows: Any) -> list[dict[str, str]]:
        shown = [p["picture"] for p in predictions if "picture" in p]
        if not shown:
            return []
        figure = new_figure(figsize=(1.6 * len(shown), 5.0))
        grid = figure.subplots(len(STAGES), len(shown), squeeze=False)
        for axes, stage, pictures in zip(grid, STAGES, zip(*shown, strict=True), strict=True):
            axes[0].set_ylabel(stage)
            for cell, picture in zip(axes, pictures, strict=True):
                cell.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                cell.set(xticks=[], yticks=[])
        return [as_png(figure, "Hidden cells and what the model paints there")]


class MaskedImages(EpochDataset, torch.utils.data.Dataset[dict[str, Any]]):
    """Images with a mask each, (num_cells,) with 1 at hidden cells: a function of seed, `set_epoch` and the row.

    Of measured rows, `is_shown` marks those in `shown`.
    """

    def __init__(self, images: PixelRows, num_cells: int, *, ratio: float, seed: int, shown: Sequence[int]):
        self.images, self.num_cells, self.ratio, self.seed = images, num_cells, ratio, seed
        self.shown = set(map(int, shown))

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.images.set_epoch(epoch)  # they are augmented, with other random numbers

    def __getitem__(self, row: int) -> dict[str, Any]:
        (draw,) = row_draws(self.seed, self.epoch, row).spawn(1)
        hidden = hidden_cells(self.num_cells, self.ratio, draw)
        marks = {"is_shown": row in self.shown} if self.shown else {}
        return {**self.images[row], "hidden": hidden, **marks}


def num_cells(config: PreTrainedConfig, cell_size: int | None) -> int:
    """Cells of an image; `cell_size` is in pixels per side, by default that of one position of the model.

    Raises: UserError if the cells do not tile the images.
    """
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    position = getattr(config, "stage_strides", [getattr(config, "patch_size", 1)])[-1]
    cell = cell_size or position
    if cell < 1 or side % cell or side // cell < 2:
        raise UserError(
            f"mask_cell_size={cell} does not cut images of {side} x {side} pixels into whole cells, two or more "
            f"along a side; a position of this model is {position} pixels wide"
        )
    return (side // cell) ** 2


def pixels_of(cells: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Cells (B, M) of a square grid as pixels (B, 1, H, W)."""
    side = round(cells.shape[1] ** 0.5)
    size = pixels.shape[-1] // side
    return cells.view(-1, 1, side, side).repeat_interleave(size, 2).repeat_interleave(size, 3)


def mean_error(painted: torch.Tensor, pixels: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Mean absolute error (B,) of images (B, C, H, W) where `hidden` (B, 1, H, W)."""
    return ((painted - pixels).abs().mean(1, keepdim=True) * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3))


def as_image(pixels: torch.Tensor) -> np.ndarray:
    """(C, H, W) from 0 to 1 as bytes (H, W, C), without the last axis if it is grey."""
    array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return array[..., 0] if array.shape[-1] == 1 else array


TASK = Task(
    name="masked_image_modeling",
    auto_class=AutoModelForMaskedImageModeling,
    about={
        "pipeline_tag": "image-feature-extraction",
        "auto_class": "AutoModelForMaskedImageModeling",
        "noun": "masked image model",
        "loss_unit": "",
        "limits": "It is meant to be fine-tuned; what it paints is a blurred guess in the manner of its training "
        "images, and shows nothing that is really there.",
    },
    arguments=MaskedImageModelingArguments,
    data=MaskedImageModelingData,
    objective=MaskedImageModelingObjective,
    scorer=MaskedImageModelingScorer,
    main_metric="loss",
    unit="images",
)
