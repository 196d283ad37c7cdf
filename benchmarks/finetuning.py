"""An epoch of recipes/finetune.py's path beside the shortest loop: same model, same batches, same optimizer.

An epoch is its training steps and one evaluation.  The loop has its batches ready as tensors: no reading, decoding,
augmentation, collation, metrics, logging or guard; its evaluation is a forward pass over the same rows.  It runs
three times: in a process of its own, as anybody would write it; in ours, where freed memory is kept in huge pages, so
that the ratio is all that the path adds; and there with batches that it reads, augments and collates in each epoch, so
that the ratio is what Trainer, guard, metrics and logging add.  All train in the precision of the recipe, take turns
epoch by epoch, and start from the same weights.  The data have the shape of known sets (sizes, lengths, labels) and
are made here.
"""

import io
import json
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.nn import functional as F
from transformers import TrainerCallback, set_seed

from benchmarks.rows import ROOT, Line, Settings, at_least, at_most, in_a_process, row
from bmtk.arguments import chosen_fields
from bmtk.tasks import task_named
from bmtk.tasks.objective import Objective
from bmtk.training.allocation import keep_freed_memory
from bmtk.training.callbacks import RecordHistory
from bmtk.training.finetuning_arguments import resolve_defaults
from bmtk.training.optimizers import build_optimizer
from bmtk.training.trainer import TaskTrainer, build_trainer
from recipes import finetune

Batch = Mapping[str, Any]
Loss = Callable[[torch.nn.Module, Batch], torch.Tensor]  # of a batch, as the shortest loop computes it


@row
def image_classification(settings: Settings) -> list[Line]:
    """28 x 28 images (PNG in parquet), the CNN of fashion_mnist.yaml: images/s and seconds an epoch."""
    sizes = (256, 64) if settings.quick else (5120, 512)
    files = image_files(settings.folder, sizes)
    epochs = Epochs(
        "image_classification/fashion_mnist", files, cross_entropy, settings, ["--horizontal_flip", "true"]
    )
    lines = epochs.lines("CNN, 28 x 28: epoch")
    rates = [[sizes[0] / lap for lap in epochs.steps[name]] for name in ("ours", "bare")]
    return [Line("CNN, 28 x 28: training", "images/s", *rates, "bare loop", at_least(0.9)), *lines]


@row
def text_classification(settings: Settings) -> list[Line]:
    """Questions of 4 to 37 words in six classes, the CNN of trec_cnn.yaml: seconds an epoch."""
    files = text_files(settings.folder, (200, 50) if settings.quick else (5180, 272))
    epochs = Epochs("sequence_classification/trec_cnn", files, cross_entropy, settings)
    return epochs.lines("text classification, CNN: epoch")


@row
def object_detection(settings: Settings) -> list[Line]:
    """JPEG images of 640 x 480 with 14 boxes each, the detector of bccd.yaml: seconds an epoch."""
    files = box_files(settings.folder, (4, 2) if settings.quick else (64, 24))
    epochs = Epochs("object_detection/bccd", files, own_loss, settings, ["--flip", "both"])
    return epochs.lines("object detection, CNN: epoch")


@row
def speech_recognition(settings: Settings) -> list[Line]:
    """Recordings of 0.3 to 0.6 s at 8 kHz, the GRU with CTC of speech_recognition/fsdd.yaml: seconds an epoch."""
    files = recording_files(settings.folder, (64, 16) if settings.quick else (1280, 128))
    epochs = Epochs("speech_recognition/fsdd", files, ctc_loss, settings, ["--sampling_rate", "8000"])
    return epochs.lines("speech recognition, GRU with CTC: epoch")


# --------------------------------------------------------------------------------------------------------- contestants


class Epochs(TrainerCallback):
    """Epochs of the recipe's path; before each, one of the loop in a process of its own, and two of it in ours."""

    def __init__(
        self, config: str, files: Mapping[str, Path], loss: Loss, settings: Settings, facts: Sequence[str] = ()
    ):
        """`config` names a file of recipes/configs, whose data are replaced by `files`; `facts` are about these."""
        self.settings, self.loss = settings, loss
        self.folder = settings.folder / config.replace("/", "-")
        file = ROOT / "recipes" / "configs" / f"{config}.yaml"
        words = ["--config", str(file), "--output_dir", str(self.folder), "--dataset", "null"]
        words += [word for split, path in files.items() for word in (f"--{split}_file", str(path))]
        words += ["--num_train_epochs", str(settings.turns + 1), "--eval_strategy", "epoch", "--save_strategy", "no"]
        words += ["--load_best_model_at_end", "false", "--disable_tqdm", "true", *facts]
        self.words = words  # one epoch more than there are turns, which warms up
        self.loops: dict[str, Callable[[], tuple[float, float]]] = {}
        self.started = 0.0
        names = ("ours", "bare", "kept", "reading")
        self.whole: dict[str, list[float]] = {name: [] for name in names}
        self.steps: dict[str, list[float]] = {name: [] for name in names}

    def lines(self, work: str) -> list[Line]:
        """Seconds of an epoch beside the loop by itself, with our allocator, and with reading, too."""
        trainer = trainer_of(self.words, self.folder)
        keep_freed_memory(trainer.args.device)  # as `train` does
        trainer.add_callback(self)
        kept, reading = Bare(trainer, self.loss), Bare(trainer, self.loss, reads=True)
        with in_a_process(bare_epochs, self.words, self.folder, self.loss, self.settings) as ask:
            own = {"kept": kept, "reading": reading}
            self.loops = {"bare": ask} | {name: partial(loop.epoch, self.settings.now) for name, loop in own.items()}
            trainer.train()
        for found in (self.whole, self.steps):
            for laps in found.values():
                del laps[0]
        ours, bare, same, read = self.whole.values()
        return [
            Line(work, "s", ours, bare, "bare loop", at_most(1.1)),
            Line(f"{work}, memory kept by both", "s", ours, same, "bare loop"),
            Line(f"{work}, memory kept and rows read by both", "s", ours, read, "bare loop"),
        ]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        generator = torch.get_rng_state()
        for name, loop in self.loops.items():
            trained, whole = loop()
            self.steps[name].append(trained)
            self.whole[name].append(whole)
        torch.set_rng_state(generator)
        self.started = self.settings.now()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps["ours"].append(self.settings.now() - self.started)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.whole["ours"].append(self.settings.now() - self.started)


def trainer_of(words: list[str], folder: Path) -> TaskTrainer:
    objective, model, args = prepared(words)
    callbacks = [RecordHistory(folder, unit=objective.unit)]
    return build_trainer(model, objective, args, folder=folder, callbacks=callbacks)


def bare_epochs(words: list[str], folder: Path, loss: Loss, settings: Settings) -> Iterator[tuple[float, float]]:
    """Seconds of the steps and of the whole of one epoch after another."""
    bare = Bare(trainer_of(words, folder), loss)
    while True:
        yield bare.epoch(settings.now)


def prepared(words: list[str]) -> tuple[Objective, torch.nn.Module, Any]:
    """Objective, model and settings of a command line of recipes/finetune.py, as the recipe makes them."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision of another row
    run, data_args, args, adapter, _, architecture = finetune.read_arguments(words)
    data = task_named(run.task).read(data_args, seed=args.seed, **run.reading)
    set_seed(args.seed)
    objective, model = finetune.start(run, data, adapter, chosen_fields(architecture))
    resolve_defaults(args, objective)
    return objective, model, args


class Bare:
    """The shortest loop: a copy of the model, batches that are ready or `reads`, the fused optimizer, clipping."""

    def __init__(self, trainer: TaskTrainer, loss: Loss, *, reads: bool = False):
        self.model, self.loss, args = deepcopy(trainer.model), loss, trainer.args
        loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
        self.batches, self.evaluated = loaders if reads else map(list, loaders)
        self.max_norm = args.max_grad_norm
        self.autocast = trainer.accelerator.autocast
        rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": True}
        self.optimizer = (
            build_optimizer(self.model, args)
            if args.optimizer
            else torch.optim.AdamW(self.model.parameters(), **rates)
        )

    def epoch(self, now: Callable[[], float]) -> tuple[float, float]:
        """Seconds of its steps, and with its evaluation."""
        started = now()
        self.train()
        trained = now() - started
        self.evaluate()
        return trained, now() - started

    def train(self) -> None:
        self.model.train()
        for batch in self.batches:
            with self.autocast():
                loss = self.loss(self.model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        for batch in self.evaluated:
            with self.autocast():
                self.loss(self.model, batch)


def inputs_of(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def cross_entropy(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(**inputs_of(batch)).logits.float(), batch["labels"])


def own_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch).loss


def ctc_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    scores = model(**inputs_of(batch)).logits.float().log_softmax(-1).transpose(0, 1)
    sizes = (batch["labels"] >= 0).sum(-1)
    lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
    return F.ctc_loss(scores, batch["labels"].clamp(min=0), lengths, sizes, blank=model.config.pad_token_id)


# ------------------------------------------------------------------------------------------------ data of known shapes

SPLITS = ("train", "validation")


def image_files(folder: Path, sizes: tuple[int, int]) -> dict[str, Path]:
    """Grey PNG images of 28 x 28 in ten classes; a class is a bright square in a place of its own."""
    draw, files = np.random.default_rng(0), {}
    for split, count in zip(SPLITS, sizes, strict=True):
        labels = draw.integers(10, size=count)
        images = draw.integers(100, size=(count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[(label // 5) * 14 : (label // 5) * 14 + 8, (label % 5) * 5 : (label % 5) * 5 + 5] += 120
        rows = {
            "image": [{"bytes": encoded(image, "png"), "path": None} for image in images],
            "label": labels.tolist(),
        }
        files[split] = folder / f"images-{split}.parquet"
        Dataset.from_dict(rows).to_parquet(files[split])
    return files


def encoded(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def text_files(folder: Path, sizes: tuple[int, int]) -> dict[str, Path]:
    """Questions of 4 to 37 words, ten at the median, of a vocabulary of 8,000 whose frequencies fall as Zipf found."""
    draw, files = np.random.default_rng(0), {}
    shares = 1 / np.arange(1, 8001)
    for split, count in zip(SPLITS, sizes, strict=True):
        files[split] = folder / f"texts-{split}.jsonl"
        with files[split].open("w", encoding="utf-8") as file:
            for number in range(count):
                length = int(np.clip(draw.lognormal(2.3, 0.35), 4, 37))
                label = int(draw.integers(6))
                words = draw.choice(8000, size=length, p=shares / shares.sum())
                text = " ".join([f"kind{label}", *(f"word{word}" for word in words), f"number{number}{split}"])
                file.write(json.dumps({"text": text, "label": f"class{label}"}) + "\n")
    return files


def box_files(folder: Path, sizes: tuple[int, int]) -> dict[str, Path]:
    """JPEG images of 640 x 480 with 14 cells in three classes, which differ in size and colour."""
    draw, files = np.random.default_rng(0), {}
    for split, count in zip(SPLITS, sizes, strict=True):
        rows: dict[str, list[Any]] = {"image": [], "objects": []}
        for _ in range(count):
            picture = np.full((480, 640, 3), 220, np.uint8)
            picture -= draw.integers(20, size=picture.shape, dtype=np.uint8)
            boxes, kinds = [], []
            for _ in range(14):
                kind = int(draw.choice(3, p=(0.85, 0.08, 0.07)))
                side = (100, 160, 40)[kind]
                left, top = int(draw.integers(640 - side)), int(draw.integers(480 - side))
                picture[top : top + side, left : left + side] -= np.array(
                    [(20, 90, 90), (90, 90, 20), (60, 20, 60)][kind], np.uint8
                )
                boxes.append([left, top, side, side])
                kinds.append(("RBC", "WBC", "Platelets")[kind])
            rows["image"].append({"bytes": encoded(picture, "jpeg"), "path": None})
            rows["objects"].append({"bbox": boxes, "category": kinds})
        files[split] = folder / f"boxes-{split}.parquet"
        Dataset.from_dict(rows).to_parquet(files[split])
    return files


def recording_files(folder: Path, sizes: tuple[int, int]) -> dict[str, Path]:
    """WAV recordings of 0.3 to 0.6 s at 8 kHz: ten words, each a tone of its own in noise."""
    draw, files = np.random.default_rng(0), {}
    for split, count in zip(SPLITS, sizes, strict=True):
        rows: dict[str, list[Any]] = {"audio": [], "transcription": []}
        for _ in range(count):
            word, length = int(draw.integers(10)), int(draw.integers(2400, 4800))
            tone = np.sin(np.arange(length) * (0.1 + 0.2 * word)) * 8000 + draw.normal(0, 500, length)
            buffer = io.BytesIO()
            with wave.open(buffer, "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(tone.astype("<i2").tobytes())
            rows["audio"].append({"bytes": buffer.getvalue(), "path": None})
            rows["transcription"].append("zero one two three four five six seven eight nine".split()[word])
        files[split] = folder / f"recordings-{split}.parquet"
        Dataset.from_dict(rows).to_parquet(files[split])
    return files
