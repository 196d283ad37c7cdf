"""Whole training steps of bm_transformer beside those of transformers' Llama: same weights, same rows, same settings.

    python benchmarks/steps.py                        # tokens/s and peak memory
    python benchmarks/steps.py --profile ours         # where a step's time goes (torch.profiler)
    python benchmarks/steps.py --characters           # 0.8 M parameters, context 64, Muon: the model of characters

A step is forward, backward, clipping and AdamW in bf16 autocast.  The contestants take turns in one process, so that
what else the machine does meets all of them; a ratio is the median over the rounds, with least and most.  Peak
memory is that of a process of its own for each.  CPU seconds are beside the wall's: where they agree with the number
of threads, the machine was not shared.

    ours       the project's loop (bmtk/training/updates.py)
    bare       the same model and optimizer in the shortest loop
    dropout    ours with a dropout of 0.1
    llama      LlamaForCausalLM in the shortest loop, with torch's fused AdamW
    trainer    LlamaForCausalLM in transformers' Trainer
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import bmtk  # noqa: F401 - registers the families
from bmtk.hub.convert import converted
from bmtk.training.optimizers import build_optimizer
from bmtk.training.prepared import Prepared
from bmtk.training.updates import Losses, Updater, can_skip_logits

NAMES = ("ours", "bare", "dropout", "llama", "trainer")
RATIOS = (("ours", "llama"), ("ours", "trainer"), ("ours", "bare"), ("dropout", "ours"))
MAX_NORM, RATE, DECAY = 1.0, 1e-3, 0.1


@dataclass(frozen=True)
class Shape:
    """A model and its batch: `rows` times `context` tokens a step."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocabulary: int = 8192
    rows: int = 16
    optimizer: str = "adamw"

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    def llama(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                intermediate_size=-(-8 * self.width // 3 // 8) * 8,
                max_position_embeddings=self.context,
                rms_norm_eps=1e-5,
                attention_dropout=0.0,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def batch(self, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        return torch.randint(self.vocabulary, (self.rows, self.context + 1), generator=draw)


CHARACTERS = Shape(layers=4, width=128, heads=4, context=64, vocabulary=65, rows=12, optimizer="muon")
Step = Callable[[int], float]  # trains on one batch; returns the loss


def settings(shape: Shape) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=shape.optimizer, learning_rate=RATE, weight_decay=DECAY, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, muon_learning_rate=0.02, sgd_momentum=0.9, layer_lr_decay=1.0,
    )  # fmt: skip


def ours(shape: Shape, *, dropout: float = 0.0) -> Step:
    """The model in the project's loop, as recipes/pretrain.py calls it."""
    model = with_dropout(converted(shape.llama(), "AutoModelForCausalLM"), dropout).train()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = Prepared(accelerator.prepare(model), build_optimizer(model, settings(shape)), accelerator)
    updater = Updater(prepared, Losses(lambda batch: batch["shift_labels"].numel()), max_grad_norm=MAX_NORM)

    def step(number: int) -> float:
        rows = shape.batch(number)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        positions = torch.arange(shape.context).expand_as(inputs)
        batch = {"input_ids": inputs, "labels": inputs, "shift_labels": targets, "position_ids": positions}
        return updater.step([batch], number).loss.item()

    return step


def with_dropout(model: torch.nn.Module, probability: float) -> torch.nn.Module:
    """The model with a dropout of the residual additions and of the embeddings."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
    return model


def bare(shape: Shape, *, is_ours: bool) -> Step:
    """The shortest loop that trains a model this way."""
    model = shape.llama()
    model = (converted(model, "AutoModelForCausalLM") if is_ours else model).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    optimizer = build_optimizer(model, settings(shape)) if is_ours else fused
    options = {"skip_logits": True} if is_ours and can_skip_logits(model) else {}

    def step(number: int) -> float:
        rows = shape.batch(number)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs, labels=inputs, shift_labels=targets, use_cache=False, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class Laps(TrainerCallback):
    """Wall and CPU clock at the end of each of Trainer's steps."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))


def trainer_seconds(shape: Shape) -> Iterator[tuple[float, float]]:
    """Wall and CPU seconds of one step of Trainer; one run of it for each."""
    model, first = shape.llama(), 0
    while True:
        rows = [
            {"input_ids": row[:-1], "labels": row[:-1]} for row in torch.cat([shape.batch(first + i) for i in (0, 1)])
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=2, per_device_train_batch_size=shape.rows, bf16=True, use_cpu=True, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=RATE, weight_decay=DECAY,
                max_grad_norm=MAX_NORM, dataloader_pin_memory=False,
            )  # fmt: skip
            laps = Laps()
            trainer = Trainer(
                model, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[laps]
            )
            trainer.train()
        (started, cpu_started), (ended, cpu_ended) = laps.ends
        yield ended - started, cpu_ended - cpu_started
        first += 2


def step_seconds(step: Step) -> Iterator[tuple[float, float]]:
    """Wall and CPU seconds of one step after another."""
    number = 0
    while True:
        started, cpu_started = time.perf_counter(), time.process_time()
        step(number)
        yield time.perf_counter() - started, time.process_time() - cpu_started
        number += 1


MAKE: dict[str, Callable[[Shape], Step]] = {
    "ours": ours,
    "bare": lambda shape: bare(shape, is_ours=True),
    "dropout": lambda shape: ours(shape, dropout=0.1),
    "llama": lambda shape: bare(shape, is_ours=False),
}


def contestant(name: str, shape: Shape) -> Iterator[tuple[float, float]]:
    return trainer_seconds(shape) if name == "trainer" else step_seconds(MAKE[name](shape))


def peak_megabytes(name: str) -> float:
    """The largest memory of a process that makes three steps, measured in a child of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory_of(name: str, shape: Shape) -> None:
    seconds = contestant(name, shape)
    for _ in range(3):
        next(seconds)
    # Not ru_maxrss, which a child inherits from the process that starts it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measured(names: list[str], shape: Shape, rounds: int) -> dict[str, object]:
    """Tokens per second of each, and ratios of pairs, over `rounds` in which all take their turn."""
    clocks = {name: contestant(name, shape) for name in names}
    laps = {name: [next(clock) for _ in range(2)] for name, clock in clocks.items()}  # these warm up
    for name in names:
        laps[name] = []
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):  # no one always comes after the same other
            laps[name].append(next(clocks[name]))
    wall = {name: [seconds for seconds, _ in found] for name, found in laps.items()}
    return {
        "tokens_per_second": {name: spread([shape.tokens / s for s in found]) for name, found in wall.items()},
        "step_ms": {name: spread([1000 * s for s in found]) for name, found in wall.items()},
        "cpu_over_wall": {name: sum(c for _, c in found) / sum(w for w, _ in found) for name, found in laps.items()},
        "speed_ratio": {
            f"{one}/{other}": spread([b / a for a, b in zip(wall[one], wall[other], strict=True)])
            for one, other in RATIOS
            if one in wall and other in wall
        },
    }


def print_profile(name: str, shape: Shape) -> None:
    seconds = contestant(name, shape)
    next(seconds)
    next(seconds)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        next(seconds)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=32, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="contestants")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, help="rows of a step; default: 16, with --characters 12")
    parser.add_argument("--characters", action="store_true", help="the small model of characters, with Muon")
    parser.add_argument("--profile", choices=NAMES, metavar="NAME", help="profile one contestant's step instead")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in a process for each")
    parser.add_argument("--memory_of", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    shape = CHARACTERS if args.characters else Shape()
    shape = Shape(**{**vars(shape), "rows": args.rows or shape.rows})
    if args.memory_of:
        return memory_of(args.memory_of, shape)
    if args.profile:
        return print_profile(args.profile, shape)
    names = [name for name in args.only if not (args.characters and name == "trainer")]
    figures = {"machine": machine(), "shape": vars(shape), **measured(names, shape, args.rounds)}
    if args.memory:
        figures["peak_megabytes"] = {name: peak_megabytes(name) for name in names}
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
