"""Whole training steps of bm_transformer beside those of transformers' Llama: same weights, same rows, same settings.

    python benchmarks/run.py lm_step lm_memory char_step
    python -m benchmarks.steps --profile ours         # where a step's time goes (torch.profiler)

A step is forward, backward, clipping and the optimizer in bf16 autocast.  The contestants take turns, each in a
process of its own with what its users get: our loop keeps freed memory, in huge pages; the others have the system's.

    ours       the project's loop (bmtk/training/updates.py)
    bare       the same model and optimizer in the shortest loop
    dropout    ours with a dropout of 0.1
    llama      LlamaForCausalLM in the shortest loop, with torch's fused AdamW
    trainer    LlamaForCausalLM in transformers' Trainer
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from transformers import AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

import bmtk  # noqa: F401 - registers the families
from benchmarks.rows import ROOT, Line, Settings, Target, at_least, at_most, in_a_process, row, take_turns
from bmtk.hub.convert import converted
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.training.allocation import keep_freed_memory
from bmtk.training.memory import peak_memory
from bmtk.training.optimizers import build_optimizer
from bmtk.training.prepared import Prepared
from bmtk.training.throughput import flops_per_token, peak_flops
from bmtk.training.updates import Losses, Updater, can_skip_logits

MAX_NORM, RATE, DECAY = 1.0, 1e-3, 0.1


@dataclass(frozen=True)
class Shape:
    """A model and its batch: `rows` times `context` tokens a step, on a device."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocabulary: int = 8192
    rows: int = 16
    optimizer: str = "adamw"
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.rows * self.context

    def llama(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
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
        return model.to(self.device)

    def batch(self, step: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(step)
        return torch.randint(self.vocabulary, (self.rows, self.context + 1), generator=draw).to(self.device)


CHARACTERS = Shape(layers=4, width=128, heads=4, context=64, vocabulary=65, rows=12, optimizer="muon")
QUICK = Shape(layers=1, width=32, heads=2, context=16, vocabulary=64, rows=2)
Step = Callable[[int], Any]  # trains on one batch

# ---------------------------------------------------------------------------------------------------------------- rows


@row
def lm_step(settings: Settings) -> list[Line]:
    """6 layers, width 384, context 256, vocabulary 8,192, bf16: tokens/s beside Llama, dropout, a bare loop."""
    shape = QUICK if settings.quick else Shape()
    return step_lines("6L/384/256/8k", shape, replace(settings, repeats=3 * settings.repeats))  # of less than a second


@row
def char_step(settings: Settings) -> list[Line]:
    """4 layers, width 128, context 64, 12 rows, Muon: tokens/s beside Llama with AdamW in a bare loop."""
    shape = replace(QUICK, optimizer="muon") if settings.quick else CHARACTERS
    turns = replace(settings, repeats=6 * settings.repeats)  # of milliseconds
    rates = tokens_per_second(("ours", "llama", "dropout"), shape, turns)
    lines = [Line("characters", "tokens/s", rates["ours"], rates["llama"], "Llama, bare loop", mfu=mfu(rates, shape))]
    return [
        *lines,
        Line("characters, dropout 0.1", "tokens/s", rates["dropout"], rates["ours"], "without", at_least(0.95)),
    ]


@row
def lm_memory(settings: Settings) -> Line:
    """The same model in processes of their own: peak memory beside Trainer + Llama."""
    contestants = {name: lambda name=name: peak_megabytes(name, quick=settings.quick) for name in ("ours", "trainer")}
    found = take_turns(contestants, min(settings.turns, 3), warm_up=False)
    note = "memory hardly varies"
    return Line(
        "6L/384/256/8k, peak memory", "MB", found["ours"], found["trainer"], "Trainer + Llama", at_most(0.6), note=note
    )


@row
def masked_lm_step(settings: Settings) -> list[Line]:
    """Forward and backward of a masked language model whose hidden tokens alone are scored, beside all tokens."""
    sizes = [{"vocab_size": 6000, "hidden_size": 128, "num_hidden_layers": 2}]
    sizes += [] if settings.quick else [{"vocab_size": 30522, "hidden_size": 256, "num_hidden_layers": 4}]
    return [masked_lm_line(size, settings) for size in sizes]


@row
def mfu_peak(settings: Settings) -> list[Line]:
    """The peak that MFU divides by, beside a benchmark of matrix products in the same process."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return [peak_line(name, dtype, settings) for name, dtype in kinds.items()]


def step_lines(work: str, shape: Shape, settings: Settings, *, least: float = 1.4) -> list[Line]:
    names = ("ours", "trainer", "llama", "bare", "dropout")
    rates = tokens_per_second(names, shape, settings)
    milliseconds = {name: [1000 * shape.tokens / rate for rate in found] for name, found in rates.items()}

    def line(what: str, ours: str, peer: str, peer_name: str, target: Target | None = None) -> Line:
        found = Line(f"{work}{what}", "tokens/s", rates[ours], rates[peer], peer_name, target)
        found.mfu = mfu(rates, shape) if ours == "ours" else None
        return found

    return [
        line("", "ours", "trainer", "Trainer + Llama", at_least(least)),
        line("", "ours", "llama", "Llama, bare loop"),
        line(", dropout 0.1", "dropout", "ours", "without", at_least(0.95)),
        Line(f"{work}, loop", "ms a step", milliseconds["ours"], milliseconds["bare"], "bare loop", at_most(1.02)),
    ]


def tokens_per_second(names: tuple[str, ...], shape: Shape, settings: Settings) -> dict[str, list[float]]:
    """Tokens per second of each, over turns of one step; two steps of each warm up."""
    with ExitStack() as running:
        clocks = {name: running.enter_context(in_a_process(contestant, name, shape, settings.now)) for name in names}
        for clock in clocks.values():
            clock()
        return take_turns(
            {name: lambda clock=clock: shape.tokens / clock() for name, clock in clocks.items()}, settings.turns
        )


def mfu(rates: dict[str, list[float]], shape: Shape) -> float:
    """Of the best turn, as the peak is the best of its products."""
    per_token = flops_per_token(converted(shape.llama(), "AutoModelForCausalLM"), shape.context)
    return max(rates["ours"]) * per_token / peak_flops(torch.device(shape.device), torch.bfloat16)


def peak_line(name: str, dtype: torch.dtype, settings: Settings, device: str = "cpu") -> Line:
    # Small ones, too: on a CPU float32 products that fit into a cache are a fifth faster than large ones.
    sizes = (256,) if settings.quick else (256, 384, 512, 1024, 2048) if device == "cpu" else (4096, 8192, 16384)
    turns = {
        "ours": lambda: peak_flops(torch.device(device), dtype) / 1e12,
        "peer": lambda: max(matmul_rate(size, dtype, device) for size in sizes) / 1e12,
    }
    found = take_turns(turns, 3 * settings.turns)  # of half a second, in which the machine may be slowed down
    line = Line(f"peak for MFU, {name}", "TFLOP/s", found["ours"], found["peer"], "matmul", Target(1.03))
    line.note = "target: within 3 % either way"
    line.did_not_get_there = min(line.ratios) < 0.97 and sorted(line.ratios)[len(line.ratios) // 2] < 0.97
    return line


def matmul_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """The best of a tenth of a second, by torch's own stop watch: of torch's product, and of oneDNN's in float32."""
    left, right, product = torch.randn(3, size, size, device=device).to(dtype)
    names = {"left": left, "right": right, "product": product}
    ways = ["torch.mm(left, right, out=product)"]
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        names["linear"] = torch.ops.mkldnn._linear_pointwise
        ways.append("linear(left, right, None, 'none', [], '')")
    timers = [Timer(way, globals=names, num_threads=torch.get_num_threads()) for way in ways]
    return 2.0 * size**3 / min(min(timer.blocked_autorange(min_run_time=0.1).times) for timer in timers)


def masked_lm_line(size: dict[str, int], settings: Settings) -> Line:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(BmTransformerConfig(**size, num_attention_heads=4, is_causal=False))
    ids = torch.randint(10, size["vocab_size"], (8, 256))
    labels = ids.where(torch.rand(ids.shape) < 0.15, -100)

    def seconds(skip: bool) -> float:
        started = settings.now()
        model(input_ids=ids, labels=labels, skip_logits=skip).loss.backward()
        model.zero_grad()
        return settings.now() - started

    found = take_turns({"ours": lambda: seconds(True), "peer": lambda: seconds(False)}, settings.turns)
    work = f"masked LM, width {size['hidden_size']}, {size['vocab_size']:,} tokens"
    return Line(work, "s", found["ours"], found["peer"], "all tokens scored")


# --------------------------------------------------------------------------------------------------------- contestants


def settings_of(shape: Shape) -> SimpleNamespace:
    return SimpleNamespace(
        optimizer=shape.optimizer, learning_rate=RATE, weight_decay=DECAY, adam_beta1=0.9, adam_beta2=0.95,
        adam_epsilon=1e-8, muon_learning_rate=0.02, muon_momentum=0.95, sgd_momentum=0.9, layer_lr_decay=1.0,
    )  # fmt: skip


def ours(shape: Shape, *, dropout: float = 0.0) -> Step:
    """The model in the project's loop, as recipes/pretrain.py calls it."""
    model = with_dropout(converted(shape.llama(), "AutoModelForCausalLM"), dropout).to(shape.device).train()
    accelerator = accelerator_of("bf16", shape.device)
    prepared = Prepared(accelerator.prepare(model), build_optimizer(model, settings_of(shape)), accelerator)
    updater = Updater(prepared, Losses(lambda batch: batch["shift_labels"].numel()), max_grad_norm=MAX_NORM)

    def step(number: int) -> Any:
        rows = shape.batch(number)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        batch = {"input_ids": inputs, "labels": inputs, "shift_labels": targets}
        return updater.step([batch], number).loss

    return step


def accelerator_of(precision: str, device: str = "cpu") -> Accelerator:
    """A new one; the precision of the last row stays in accelerate's global state otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=device == "cpu")


def with_dropout(model: torch.nn.Module, probability: float) -> torch.nn.Module:
    """The model with a dropout of the residual additions and of the embeddings."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
    return model


def bare(shape: Shape, *, is_ours: bool) -> Step:
    """The shortest loop that trains a model this way."""
    model = shape.llama()
    model = (converted(model, "AutoModelForCausalLM").to(shape.device) if is_ours else model).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    optimizer = build_optimizer(model, settings_of(shape)) if is_ours else fused
    options = {"skip_logits": True} if is_ours and can_skip_logits(model) else {}

    def step(number: int) -> Any:
        rows = shape.batch(number)
        inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with torch.autocast(shape.device, torch.bfloat16):
            loss = model(inputs, labels=inputs, shift_labels=targets, use_cache=False, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def step_seconds(step: Step, now: Callable[[], float]) -> Iterator[float]:
    """Seconds of one step after another, until its loss is known."""
    number = 0
    while True:
        started = now()
        step(number).item()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield now() - started
        number += 1


MAKE: dict[str, Callable[[Shape], Step]] = {
    "ours": ours,
    "bare": lambda shape: bare(shape, is_ours=True),
    "dropout": lambda shape: ours(shape, dropout=0.1),
    "llama": lambda shape: bare(shape, is_ours=False),
}


def contestant(name: str, shape: Shape, now: Callable[[], float]) -> Iterator[float]:
    if name == "trainer":
        from benchmarks.trainer_steps import trainer_seconds  # the processes of the others do without its imports

        return trainer_seconds(shape, now)
    if name != "llama":
        keep_freed_memory(torch.device(shape.device))  # as the project's loop does
    return step_seconds(MAKE[name](shape), now)


def peak_megabytes(name: str, *, quick: bool) -> float:
    """The largest memory of a process that makes four steps, measured in a child of its own."""
    command = [sys.executable, "-m", "benchmarks.steps", "--memory_of", name, *(["--quick"] if quick else [])]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(found.stdout.split()[-1])


def memory_of(name: str, shape: Shape) -> None:
    seconds = contestant(name, shape, time.perf_counter)
    for _ in range(4):
        next(seconds)
    print(peak_memory() / 2**20)


def print_profile(name: str, shape: Shape) -> None:
    seconds = contestant(name, shape, time.perf_counter)
    next(seconds)
    next(seconds)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        next(seconds)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=32, max_name_column_width=60))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MAKE, "trainer"]
    parser.add_argument("--profile", choices=names, metavar="NAME", help="profile one contestant's step")
    parser.add_argument("--characters", action="store_true", help="of the small model of characters, with Muon")
    parser.add_argument("--memory_of", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape = CHARACTERS if args.characters else QUICK if args.quick else Shape()
    if args.memory_of:
        memory_of(args.memory_of, shape)
    elif args.profile:
        print_profile(args.profile, shape)
    else:
        parser.error("name what to profile, or measure with benchmarks/run.py")


if __name__ == "__main__":
    main()
