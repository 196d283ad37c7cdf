"""Whole processes, from the command to its end: characters to a loss, the default pretraining, images to an accuracy.

    python benchmarks/run.py lm_time_to_loss --nanogpt DIR        # DIR: a clone of github.com/karpathy/nanoGPT

A contestant that ends above the loss (below the accuracy) is marked: its time is that of a run that did not get there.
"""

import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import ROOT, Line, Settings, at_most, not_run, row, started_command, timed

TEXT = ROOT / "recipes" / "data" / "tiny_shakespeare"
CHARACTERS = "recipes/configs/causal_lm/tiny_shakespeare_char.yaml"
TARGET, STEPS, LLAMA_STEPS = 1.88, 125, 800  # loss; few steps of ours and of Llama that get there
README_COMMAND = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
BEFORE = "9d39038f66d10f8d6059d83d82e812a0acc8ef82"  # the project before it was made faster
IMAGE_EPOCHS, SMALL_IMAGE_EPOCHS = 2, 20  # of ours, which get there
RESNET_EPOCHS = 9  # the fewest that get there: 8 end at 0.9195
# In so few epochs no image is seen often; strongly changed ones only take longer to learn.
FEW_EPOCHS = ("--rand_augment", "0", "--random_erasing", "0")
FEW = 3  # turns of what takes minutes


@dataclass(frozen=True)
class Lap:
    """One process: seconds of it and of its training, and what it reached (a loss, or an accuracy)."""

    whole: float
    training: float
    reached: float


Contestant = Callable[[Settings, Path], Lap]

# ---------------------------------------------------------------------------------------------------------------- rows


@row
def lm_time_to_loss(settings: Settings) -> list[Line]:
    """Characters of tiny Shakespeare, 0.8 M parameters, to a validation loss of 1.88, beside nanoGPT and Llama."""
    peers: dict[str, Contestant] = {"llama": llama, **({"nanogpt": nanogpt} if settings.nanogpt else {})}
    laps = turns_of({"ours": ours, **peers}, settings)
    lines = lines_of("characters to 1.88", laps, "llama", "Trainer + Llama", 1 / 3, goal=TARGET)
    if settings.nanogpt:
        return lines + lines_of("characters to 1.88", laps, "nanogpt", "nanoGPT", 1 / 4, goal=TARGET)
    return [*lines, not_run("characters to 1.88", "needs --nanogpt DIR, a clone of nanoGPT", at_most(1 / 4))]


@row
def lm_pretrain(settings: Settings) -> Line:
    """The command of `make pretrain` to a validation loss of 3.72: training time beside the project before."""
    before = former_project(settings)
    if not before:
        return not_run("make pretrain", f"needs a clone with the commit {BEFORE[:7]}", at_most(0.5))
    contestants = {"ours": pretraining(ROOT), "peer": pretraining(before)}
    turns = min(FEW, settings.turns)
    laps = turns_of(contestants, replace(settings, repeats=turns))
    line = training_line("make pretrain, training", laps, "peer", f"commit {BEFORE[:7]}", 0.5, goal=3.72)
    return replace(line, note=f"few turns, as one takes minutes{'; ' if line.note else ''}{line.note}")


@row
def images_time_to_accuracy(settings: Settings) -> Line:
    """Fashion-MNIST to a test accuracy of 0.92, whole process, beside Trainer + ResNet (needs --data)."""
    work, folder = "Fashion-MNIST to 0.92", data_folder(settings, "fashion_mnist")
    if not folder:
        return not_run(work, "needs --data DIR with fashion_mnist (train.parquet, test.parquet)", at_most(1 / 3))
    laps = turns_of({"ours": fashion(folder), "resnet": resnet(folder)}, replace(settings, repeats=1))
    line = whole_line(work, laps, "resnet", "Trainer + ResNet", 1 / 3, goal=0.92, is_accuracy=True)
    return replace(line, note=f"1 turn, as one takes many minutes{'; ' if line.note else ''}{line.note}")


@row
def small_images_time_to_accuracy(settings: Settings) -> Line:
    """CIFAR-10, 5,000 images, to an accuracy of 0.70: training time beside the project before (needs --data)."""
    work, folder = "CIFAR-10 mini to 0.70", data_folder(settings, "cifar10_mini")
    before = former_project(settings) if folder else None
    if not folder or not before:
        return not_run(work, f"needs --data DIR with cifar10_mini, and the commit {BEFORE[:7]}", at_most(0.5))
    contestants = {"ours": small_images(ROOT, folder), "peer": small_images(before, folder)}
    laps = turns_of(contestants, replace(settings, repeats=1))
    line = training_line(work, laps, "peer", f"commit {BEFORE[:7]}", 0.5, goal=0.70, is_accuracy=True)
    return replace(line, note=f"1 turn, as one takes many minutes{'; ' if line.note else ''}{line.note}")


def turns_of(contestants: dict[str, Contestant], settings: Settings) -> dict[str, list[Lap]]:
    laps: dict[str, list[Lap]] = {name: [] for name in contestants}
    for turn in range(settings.turns):
        for name in contestants if turn % 2 == 0 else reversed(list(contestants)):
            with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
                laps[name].append(contestants[name](settings, Path(folder)))
    return laps


def lines_of(work: str, laps: dict[str, list[Lap]], peer: str, name: str, bound: float, *, goal: float) -> list[Line]:
    return [
        whole_line(f"{work}, process", laps, peer, name, bound, goal=goal),
        training_line(f"{work}, training", laps, peer, name, bound, goal=goal),
    ]


def whole_line(work: str, laps: dict[str, list[Lap]], peer: str, name: str, bound: float, **goal: Any) -> Line:
    return seconds_line(work, laps, peer, name, bound, seconds=lambda lap: lap.whole, **goal)


def training_line(work: str, laps: dict[str, list[Lap]], peer: str, name: str, bound: float, **goal: Any) -> Line:
    return seconds_line(work, laps, peer, name, bound, seconds=lambda lap: lap.training, **goal)


def seconds_line(
    work: str,
    laps: dict[str, list[Lap]],
    peer: str,
    name: str,
    bound: float,
    *,
    seconds: Callable[[Lap], float],
    goal: float,
    is_accuracy: bool = False,
) -> Line:
    """Seconds of ours and of a peer; a note where one of them did not reach `goal`, a loss or an accuracy."""
    reached = {who: [lap.reached for lap in laps[who]] for who in ("ours", peer)}
    worst = {who: min(found) if is_accuracy else max(found) for who, found in reached.items()}
    missed = [who for who, value in worst.items() if (value < goal if is_accuracy else value > goal)]
    note = f"reached {worst['ours']:.3f} and {worst[peer]:.3f}" + "".join(
        f"; {'ours' if who == 'ours' else name} did not get to {goal:g}" for who in missed
    )
    times = [[seconds(lap) for lap in laps[who]] for who in ("ours", peer)]
    return Line(work, "s", *times, name, at_most(round(bound, 3)), note=note, did_not_get_there="ours" in missed)


# ------------------------------------------------------------------------------------------- contestants of characters


def ours(settings: Settings, folder: Path) -> Lap:
    """recipes/pretrain.py with the config of characters, and as many steps as it takes."""
    steps = ["2", "--warmup_steps", "0"] if settings.quick else [str(STEPS)]
    words = ["--config", CHARACTERS, "--sample_tokens", "0", "--num_train_steps", *steps]
    return recipe_lap("pretrain", words, folder / "run", settings, metric="validation/loss")


def llama(settings: Settings, folder: Path) -> Lap:
    """LlamaForCausalLM of the same size in transformers' Trainer, AdamW, a cosine schedule."""
    call = f"train_llama({str(folder / 'run')!r}, {2 if settings.quick else LLAMA_STEPS})"
    return child_lap(call, settings)


def nanogpt(settings: Settings, folder: Path) -> Lap:
    """The command for a CPU of nanoGPT's README: 2,000 steps of 12 rows, measured on 20 random batches."""
    clone, data = folder / "nanoGPT", folder / "nanoGPT" / "data" / "shakespeare_char"
    shutil.copytree(str(settings.nanogpt), clone, ignore=shutil.ignore_patterns(".git", "assets"))
    train, validation, num_tokens = ids_of_text()
    for name, ids in (("train", train), ("val", validation)):
        ids.astype("uint16").tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": num_tokens}))
    words = ["train.py", "config/train_shakespeare_char.py", *README_COMMAND]
    words += ["--max_iters=2", "--eval_iters=1", "--log_interval=1"] if settings.quick else []
    printed, whole = timed([sys.executable, *words], cwd=clone, settings=settings)
    loss = float(re.findall(r"val loss ([\d.]+)", printed)[-1])
    steps = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", printed)]
    return Lap(whole, statistics.median(steps) * 2, loss)  # of 2,000 steps, in seconds


def ids_of_text() -> tuple[Any, Any, int]:
    """The two parts of the text as numbers of its characters, and how many characters there are."""
    import numpy as np

    parts = [(TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "validation")]
    known = {character: number for number, character in enumerate(sorted(set("".join(parts))))}
    train, validation = (np.array([known[character] for character in part]) for part in parts)
    return train, validation, len(known)


def train_llama(folder: str, steps: int) -> None:
    """Print the seconds of training and the loss of the last tenth: what the child of `llama` does."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    train, validation, num_tokens = ids_of_text()
    rows = [
        [{"input_ids": ids, "labels": ids} for ids in torch.tensor(part[: len(part) // 64 * 64]).view(-1, 64)]
        for part in (train, validation)
    ]
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(42)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=num_tokens, max_position_embeddings=64, **sizes))
    settings = {"learning_rate": 3e-3, "adam_beta2": 0.99, "lr_scheduler_type": "cosine", "warmup_steps": 100}
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=12, per_device_eval_batch_size=64, weight_decay=0.1,
        use_cpu=True, bf16=True, report_to="none", save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows[0], eval_dataset=rows[1])
    found = trainer.train()
    print(found.metrics["train_runtime"], trainer.evaluate()["eval_loss"])


# ------------------------------------------------------------------------------------------ the other contestants


def pretraining(root: Path) -> Contestant:
    def run(settings: Settings, folder: Path) -> Lap:
        words = ["--preset", "smoke"] if settings.quick else []
        return recipe_lap("pretrain", words, folder / "run", settings, metric="validation/loss", root=root)

    return run


def fashion(data: Path) -> Contestant:
    def run(settings: Settings, folder: Path) -> Lap:
        config = "recipes/configs/image_classification/fashion_mnist.yaml"
        words = ["--config", config, "--dataset", str(data), "--num_train_epochs", str(IMAGE_EPOCHS)]
        words += ["--num_train_steps", "2"] if settings.quick else []
        return recipe_lap("finetune", words, folder / "run", settings, metric="test/accuracy")

    return run


def resnet(data: Path) -> Contestant:
    def run(settings: Settings, folder: Path) -> Lap:
        steps = 2 if settings.quick else -1
        return child_lap(f"train_resnet({str(folder / 'run')!r}, {str(data)!r}, {RESNET_EPOCHS}, {steps})", settings)

    return run


def train_resnet(folder: str, data: str, epochs: int, steps: int) -> None:
    """Print the seconds of training and the test accuracy of Trainer with a ResNet-18 shape of 2.8 M parameters."""
    import datasets
    import numpy as np
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    files = {split: f"{data}/{split}.parquet" for split in ("train", "test")}
    rows = {}
    for split, table in datasets.load_dataset("parquet", data_files=files).items():
        pixels = torch.stack([torch.from_numpy(np.asarray(image.convert("L"))) for image in table["image"]])
        pixels = (pixels[:, None].float() / 255 - 0.2860) / 0.3530
        labels = torch.tensor(table["label"][:])
        rows[split] = [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]
    torch.manual_seed(42)
    sizes = {"hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "layer_type": "basic", "embedding_size": 32}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    arguments = TrainingArguments(
        folder, num_train_epochs=epochs, max_steps=steps, per_device_train_batch_size=128, learning_rate=2e-3,
        per_device_eval_batch_size=256, weight_decay=0.02, lr_scheduler_type="cosine", warmup_steps=100, bf16=True,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=42,
    )  # fmt: skip
    metrics = {"compute_metrics": lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()}}
    trainer = Trainer(model, arguments, train_dataset=rows["train"], eval_dataset=rows["test"], **metrics)
    found = trainer.train()
    print(found.metrics["train_runtime"], trainer.evaluate()["eval_accuracy"])


def small_images(root: Path, data: Path) -> Contestant:
    """Training time up to the first evaluation at 0.70 or more."""

    def run(settings: Settings, folder: Path) -> Lap:
        config = "recipes/configs/image_classification/cifar10_mini.yaml"
        # What the file says of its own data does not hold for a folder of another name.
        words = ["--config", config, "--dataset", str(data), "--horizontal_flip", "true"]
        words += ["--num_train_epochs", str(SMALL_IMAGE_EPOCHS), *FEW_EPOCHS] if root == ROOT else []
        words += ["--num_train_steps", "2"] if settings.quick else []
        return lap_until(0.70, "validation/accuracy", recipe_command("finetune", words, folder / "run"), root)

    return run


def lap_until(goal: float, metric: str, command: Sequence[str], root: Path) -> Lap:
    """A run up to the evaluation whose `metric` is `goal` or more, and no further; whole, where none is.

    `command` ends with the folder of the run.
    """
    folder, started = Path(command[-1]), time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as printed,  # a pipe that nobody reads would fill up
        started_command(command, cwd=root, stdout=printed, stderr=printed) as process,
    ):
        found = None
        try:
            while found is None and process.poll() is None:
                time.sleep(0.2)
                found = first_at(goal, metric, folder / "history.jsonl")
            found = found or first_at(goal, metric, folder / "history.jsonl")  # what it wrote last
        finally:
            process.kill()
        whole = time.perf_counter() - started
        if found is None and process.wait():
            printed.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{printed.read()[-2000:]}")
    return Lap(whole, *found) if found else finished_lap(folder, metric, whole)


def first_at(goal: float, metric: str, history: Path) -> tuple[float, float] | None:
    """Seconds of training until `metric` was `goal` or more, and what it was; None if it was not yet."""
    lines = history.read_text(encoding="utf-8").splitlines(keepends=True) if history.is_file() else []
    seconds = 0.0
    for line in (json.loads(line) for line in lines if line.endswith("\n")):  # the last one may be half written
        seconds = line.get("seconds", seconds)
        if line.get(metric, 0.0) >= goal:
            return seconds, line[metric]
    return None


def recipe_command(recipe: str, words: Sequence[str], folder: Path, launcher: Sequence[str] = ()) -> list[str]:
    """`launcher` is what Python runs in place of the recipe."""
    return [sys.executable, *launcher, f"recipes/{recipe}.py", *words, "--output_dir", str(folder)]


def recipe_lap(
    recipe: str,
    words: Sequence[str],
    folder: Path,
    settings: Settings,
    *,
    metric: str,
    root: Path = ROOT,
    launcher: Sequence[str] = (),
) -> Lap:
    """A run of one of the recipes of the project in `root`, to its end."""
    _, whole = timed(recipe_command(recipe, words, folder, launcher), cwd=root, settings=settings)
    return finished_lap(folder, metric, whole)


def finished_lap(folder: Path, metric: str, whole: float) -> Lap:
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Lap(whole, run["train_seconds"], run["metrics"][metric])


def child_lap(call: str, settings: Settings) -> Lap:
    """A function of this module in a process of its own, which prints seconds of training and what it reached."""
    code = f"from benchmarks import time_to_loss; time_to_loss.{call}"
    printed, whole = timed([sys.executable, "-c", code], settings=settings)
    training, reached = map(float, printed.split()[-2:])
    return Lap(whole, training, reached)


def data_folder(settings: Settings, name: str) -> Path | None:
    folder = settings.data / name if settings.data else None
    return folder if folder and folder.is_dir() else None


def former_project(settings: Settings) -> Path | None:
    """The project as it was at BEFORE, from the history of the clone; None without one."""
    folder = settings.folder / "before"
    if not folder.is_dir():
        archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True)
        if archive.returncode:
            return None
        folder.mkdir()
        subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
    return folder
