"""Image-text contrastive learning: an image and its caption are near each other, all others of the batch are not.

Source: CLIP, Radford et al. 2021, arXiv:2103.00020.  Two towers of any families under transformers'
VisionTextDualEncoderModel.  B pairs, P projected width, C channels, H x W pixels.
The loss of a pair is a comparison with the whole batch, so batch_size is a part of the objective: larger is harder.
"""

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bmtk.data.columns import with_columns
from bmtk.data.epoch_dataset import EpochDataset
from bmtk.data.image_transforms import BatchTransform, apply_batch_transform, draw_batch_transform
from bmtk.data.row_draws import row_draws
from bmtk.data.tables import as_text, check_column
from bmtk.errors import UserError
from bmtk.metrics.retrieval import retrieval_scores
from bmtk.settings import fact, setting

from .figures import as_png, new_figure
from .images import (
    ImageArguments,
    ImageRows,
    find_range,
    flatness,
    image_processor_for,
    rows_with_images,
    undecoded_images,
)
from .scorer import Scorer
from .task import Criterion, Prediction, Task
from .task_data import DataArguments, build_config, known_fields
from .texts import TextArguments, TextData, TextObjective

TOP = (1, 5)  # recall is measured among this many nearest
DIRECTIONS, MEASURED = ("image_to_text", "text_to_image"), (*(f"recall_at_{k}" for k in TOP), "mean_rank")
SHOWN, SHOWN_BEST = 6, 5  # captions in the figure of the report, and the nearest images of each
KEPT_BYTES = 2**30  # of training images that are decoded once


@dataclass
class ImageTextContrastiveArguments(ImageArguments, TextArguments, DataArguments):
    """Which images and captions, and two towers."""

    _argument_group_name = "data and towers of image_text_contrastive"

    caption_column: str = fact(
        "caption", "column of the caption, or of lists of captions: in training one of a row's is drawn in each epoch"
    )
    other_caption_columns: list[str] | None = fact(
        None, "columns of other texts of the image; in training one of all is drawn in each epoch"
    )
    image_augmentation: float = setting(
        0.0, "strength of random turns, shifts, sizes and colours of training images; 1: 15 degrees, 10 %, 20 %, 30 %"
    )
    vision_model_type: str = setting("bm_cnn", "architecture of a new image tower")
    vision_config: str | None = setting(None, "its fields, as YAML or JSON text: '{hidden_sizes: [32, 64]}'")
    text_model_type: str = setting("bm_transformer", "architecture of a new text tower")
    text_config: str | None = setting(None, "its fields, likewise; vocab_size comes from the tokenizer")
    projection_dim: int = setting(128, "width in which images and texts are compared")
    logit_scale_init_value: float = setting(2.6592, "logarithm of the factor on cosines where it starts")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()
        if self.image_augmentation < 0:
            raise UserError(f"image_augmentation={self.image_augmentation} must be at least 0")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        return {**super().settings_that_change(metric), "caption_column": "decides which captions are to be found"}


class ImageTextContrastiveData(TextData):
    """Columns "image" (undecoded) and "captions", a list of texts; rows without a caption are left out."""

    inputs = ("image",)

    def readable_rows(self, table: Dataset, where: str) -> Dataset:
        return rows_with_images(table, where, self.args, self.notes)

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        columns = [self.args.caption_column, *(self.args.other_caption_columns or ())]
        texts = [
            self._captions(table, name, "other_caption_columns" if number else "caption_column", where)
            for number, name in enumerate(columns)
        ]
        captions = [[*(first or [""]), *itertools.chain(*others)] for first, *others in zip(*texts, strict=True)]
        images = undecoded_images(table, where, self.args.image_column)
        rows = with_columns(images, {"captions": captions})
        return self.keep_rows_with_text(rows, [c[0] for c in captions], option="caption_column", where=where)

    def _captions(self, table: Dataset, column: str, option: str, where: str) -> list[list[str]]:
        """The texts of each row that are not blank: a cell holds one, or a list of them, as in Flickr30k and COCO."""
        check_column(table, column, option=option, where=where)
        cells, place = list(table[column]), f"{option}={column!r} of {where} row"
        counts = [len(cell) for cell in cells if isinstance(cell, list)]
        if counts:
            drawn = "one of a row's is drawn in each epoch" if where == "train" else "the first of a row is measured"
            self.notes.append(
                f"{option}={column!r} holds lists of {min(counts)} to {max(counts)} {where} captions: {drawn}"
            )
        lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
        texts = [[as_text(item, f"{place} {row}") for item in cell] for row, cell in enumerate(lists, 1)]
        return [list(filter(str.strip, of_row)) for of_row in texts]

    def training_texts(self) -> list[str]:
        return [text for captions in self.rows["train"]["captions"] for text in captions]

    def new_config(
        self, model_type: str, chosen: Mapping[str, object], *, preset: str | None = None
    ) -> VisionTextDualEncoderConfig:
        """Two towers; fields of one of them are set in `vision_config` and `text_config` alone."""
        misplaced = [*chosen, *(["preset_model"] if preset else [])]
        if misplaced:
            raise UserError(
                f"{', '.join(misplaced)}: there are two towers; put what is meant for one of them into "
                "vision_config or text_config"
            )
        args = self.args
        vision = self._tower("vision", {"input_type": "pixels"})
        text = self._tower("text", {**self.config_fields, "input_type": "tokens", "is_causal": False})
        sizes = {"projection_dim": args.projection_dim, "logit_scale_init_value": args.logit_scale_init_value}
        config: VisionTextDualEncoderConfig = VisionTextDualEncoderConfig.from_vision_text_configs(
            vision, text, **sizes
        )
        return config

    def _tower(self, kind: str, from_data: Mapping[str, object]) -> PreTrainedConfig:
        model_type, given = getattr(self.args, f"{kind}_model_type"), getattr(self.args, f"{kind}_config")
        if model_type not in CONFIG_MAPPING:
            raise UserError(f"{kind}_model_type={model_type!r} is unknown; choose bm_cnn, bm_rnn, bm_transformer, ...")
        try:
            chosen = yaml.safe_load(given or "{}")
        except yaml.YAMLError as error:
            raise UserError(f"{kind}_config is not YAML: {error}") from error
        if not isinstance(chosen, dict):
            raise UserError(f"{kind}_config={given!r} must be a mapping: '{{hidden_size: 128, num_hidden_layers: 2}}'")
        known = known_fields(CONFIG_MAPPING[model_type])
        for name in chosen:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise UserError(f"{kind}_config: a {model_type} has no field '{name}'{hint}")
        return build_config(model_type, from_data, chosen)


class ImageTextContrastiveObjective(TextObjective):
    """Images become `pixel_values`, one caption of each `input_ids`; equal captions share a number in `labels`."""

    needs_whole_batch = True

    def __init__(self, data: ImageTextContrastiveData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        """Raises: UserError for a model of another kind."""
        if not hasattr(config, "vision_config") or not hasattr(config, "text_config"):
            raise UserError(f"a {config.model_type} is not two towers; leave model out to make a new one")
        super().__init__(data, config)
        images = image_processor_for(config.vision_config, data.model, **data.loading)
        self.image_range = find_range(data, images)
        self._processor: Any = VisionTextDualEncoderProcessor(images, self.tokenizer)

    @property
    def text_config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self.config.text_config
        return config

    @property
    def processor(self) -> Any:
        """Tokenizer and image processor in one."""
        return self._processor

    def encode(self, rows: Dataset, where: str) -> "Pairs":
        captions, num_cut, tokens = list(rows["captions"]), 0, []
        for texts in captions:
            whole = self.tokenizer(texts, verbose=False, return_attention_mask=False)["input_ids"]
            num_cut += len(whole[0]) > self.longest
            tokens.append(self.tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"])
        if num_cut:
            self.notes.append(
                f"{num_cut:,} of {len(rows):,} {where} captions are longer than {self.longest} tokens: cut"
            )
        images = ImageRows(rows.select_columns("image"), where, self.image_range)
        if where == "train":
            self.notes += flatness(images)
        return Pairs(
            images,
            [texts[0] for texts in captions],
            tokens,
            image_processor=self.processor.image_processor,
            seed=self.data.seed if where == "train" else None,
            strength=self.args.image_augmentation,
        )

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads the texts of a batch; changes the images of a training batch all at once."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            pixels = torch.stack([row["pixels"] for row in rows])
            if "changes" in rows[0]:
                pixels = apply_batch_transform(
                    pixels, BatchTransform(*map(torch.stack, zip(*(row["changes"] for row in rows), strict=True)))
                )
            texts = self.tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
            labels = torch.tensor([row["caption"] for row in rows])
            return {"pixel_values": pixels, **texts, "labels": labels}

        return collate

    @property
    def criterion(self) -> Criterion:
        return contrastive_loss

    def num_units(self, batch: Mapping[str, Any]) -> int:
        return len(batch["labels"])

    def units_per_row(self, split: str) -> float:
        return 1.0

    def sizes(self) -> dict[str, dict[str, float]]:
        return {split: {"images": len(rows), "captions": len(set(rows.captions))} for split, rows in self.rows.items()}

    def example_input(self) -> str:
        return "'an_image.png', candidate_labels=['a cat', 'a dog'], hypothesis_template='{}'"


class ImageTextContrastiveScorer(Scorer):
    """A prediction holds the embeddings of image and caption; metrics measure which of them are nearest."""

    metrics = ("loss", *(f"{direction}_{name}" for direction in DIRECTIONS for name in MEASURED))

    def predict(self, model: Any, batch: Mapping[str, Any]) -> list[Prediction]:
        """The unit vectors (P,) of image and caption, and their cosine."""
        outputs = model(**self.objective.inputs_of(batch))
        images, texts = (F.normalize(outputs[f"{kind}_embeds"].float(), dim=-1) for kind in ("image", "text"))
        scale = model.logit_scale.exp().item()
        return [
            {"image": image, "text": text, "cosine": float(image @ text), "scale": scale}
            for image, text in zip(images.cpu().numpy(), texts.cpu().numpy(), strict=True)
        ]

    def score(self, predictions: Sequence[Prediction], rows: "Pairs") -> dict[str, float]:
        """Among all rows: how often the own caption (or image) is the nearest or among 5, and its mean rank.

        `loss` is that of the whole split as one batch: it grows with the number of rows.
        """
        images, texts, names = embeddings(predictions, rows)
        scale, loss = predictions[0]["scale"], 0.0
        metrics: dict[str, float] = {}
        for direction, queries, found in zip(DIRECTIONS, (images, texts), (texts, images), strict=True):
            positions, losses = ranks(queries, found, names, scale)
            loss += losses.mean() / 2
            metrics |= {
                f"{direction}_{name}": value for name, value in retrieval_scores(positions.tolist(), TOP).items()
            }
        return {"loss": float(loss), **metrics}

    def describe(self, prediction: Prediction) -> dict[str, object]:
        return {"prediction": round(prediction["cosine"], 6)}

    def samples(self, predictions: Sequence[Prediction], rows: "Pairs", count: int = 6) -> list[dict[str, str]]:
        """Captions of images from all over the split, and the captions that are nearest to these images."""
        images, texts, _ = embeddings(predictions, rows)
        samples = []
        for row in np.linspace(0, len(predictions) - 1, min(count, len(predictions))).astype(int):
            best = np.argsort(-(texts @ images[row]), kind="stable")[:3]
            samples.append(
                {"prompt": f"[{rows.captions[row]}]", "text": f" -> {' | '.join(rows.captions[i] for i in best)}"}
            )
        return samples

    def figures(self, predictions: Sequence[Prediction], rows: "Pairs") -> list[dict[str, str]]:
        """Captions and the images that are nearest to them, the own one framed."""
        images, texts, names = embeddings(predictions, rows)
        shown = np.linspace(0, len(predictions) - 1, min(SHOWN, len(predictions))).astype(int)
        figure = new_figure(figsize=(1.3 * SHOWN_BEST, 1.55 * len(shown)))
        grid = figure.subplots(len(shown), SHOWN_BEST, squeeze=False)
        for cells, row in zip(grid, shown, strict=True):
            best = np.argsort(-(images @ texts[row]), kind="stable")[:SHOWN_BEST]
            cells[0].set_title(rows.captions[row], loc="left", fontsize=9)
            for axes in cells:
                axes.set(xticks=[], yticks=[])
            for axes, index in zip(cells, best, strict=False):
                axes.imshow(rows.images[int(index)]["image"].convert("RGBA"))
                is_own = names[index] == names[row]
                axes.spines[:].set(color="tab:green" if is_own else "lightgrey", linewidth=3 if is_own else 1)
        figure.subplots_adjust(hspace=0.35, wspace=0.08)
        return [as_png(figure, "Captions and the images nearest to them (framed: its own)")]


def contrastive_loss(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of each image among the captions and of each caption among the images, halved; summed.

    `labels` (B,) are equal for equal captions: such pairs are not negatives of each other.
    """
    logits, labels = outputs["logits_per_image"].float(), batch["labels"]
    same = (labels[:, None] == labels) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits, own = logits.masked_fill(same, torch.finfo(logits.dtype).min), torch.arange(len(labels)).to(labels)
    both = [
        F.cross_entropy(scores, own, reduction="sum", label_smoothing=label_smoothing) for scores in (logits, logits.T)
    ]
    return (both[0] + both[1]) / 2


class Pairs(EpochDataset, torch.utils.data.Dataset[dict[str, Any]]):
    """Images and captions.  For training, a caption and changes of the image are drawn: functions of seed, epoch, row.

    A row: `pixels` (C, H, W), `input_ids`, `caption` (a number that equal captions share), `changes`.
    """

    def __init__(
        self,
        images: ImageRows,
        captions: Sequence[str],
        tokens: Sequence[list[list[int]]],
        *,
        image_processor: Any,
        seed: int | None,
        strength: float,
    ):
        """`tokens` are those of all texts of a row, its caption first.  Without a seed, nothing is drawn."""
        self.images, self.captions, self.tokens = images, captions, tokens
        self.image_processor, self.seed, self.strength = image_processor, seed, strength
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
        self.names = np.array([numbers[caption] for caption in captions])
        self.kept: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        texts, changes = self.tokens[row], {}
        text = texts[0]
        if self.seed is not None:
            draw = row_draws(self.seed, self.epoch, row)
            text = texts[draw.integers(len(texts))]
            if self.strength:
                changes["changes"] = draw_batch_transform(self.strength, draw)
        return {"pixels": self._pixels(row), "input_ids": text, "caption": int(self.names[row]), **changes}

    def _pixels(self, row: int) -> torch.Tensor:
        """(C, H, W), kept in memory only for training rows, which are read again in every epoch."""
        if row in self.kept:
            return self.kept[row]
        image = self.images[row]["image"]
        pixels: torch.Tensor = self.image_processor([image], return_tensors="pt")["pixel_values"][0]
        if self.seed is not None and pixels.nbytes * len(self) <= KEPT_BYTES:
            self.kept[row] = pixels
        return pixels


def embeddings(predictions: Sequence[Prediction], rows: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, P), texts (N, P), and numbers (N,) that equal captions share."""
    return np.stack([p["image"] for p in predictions]), np.stack([p["text"] for p in predictions]), rows.names


def ranks(
    queries: np.ndarray, found: np.ndarray, names: np.ndarray, scale: float, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """The rank (N,) of each query's own match among all N, from 1 on, and its cross-entropy (N,) in nats.

    Pairs with an equal caption are not counted; what is exactly as near as the own match is counted before it.
    """
    positions, losses = [], []
    for start in range(0, len(queries), block):
        rows = np.arange(start, min(start + block, len(queries)))
        cosines = queries[rows] @ found.T  # (block, N)
        own = cosines[np.arange(len(rows)), rows]
        others = names[rows, None] != names
        positions.append(1 + ((cosines >= own[:, None]) & others).sum(1))
        gaps = np.where(others, scale * (cosines - own[:, None]).astype(np.float64), -np.inf)
        top = np.maximum(gaps.max(1), 0)
        losses.append(top + np.log(np.exp(-top) + np.exp(gaps - top[:, None]).sum(1)))
    return np.concatenate(positions), np.concatenate(losses)


TASK = Task(
    name="image_text_contrastive",
    auto_class=AutoModel,
    about={
        "pipeline_tag": "zero-shot-image-classification",
        "auto_class": "AutoModel",
        "noun": "image-text dual encoder",
        "limits": "It compares images with texts like those of its training data; a high score says that a text is "
        "nearer than others, not that it is true. Towers of bmtk's own families need `import bmtk` to be loaded.",
    },
    arguments=ImageTextContrastiveArguments,
    data=ImageTextContrastiveData,
    objective=ImageTextContrastiveObjective,
    scorer=ImageTextContrastiveScorer,
    main_metric="image_to_text_recall_at_1",
    unit="images",
)
