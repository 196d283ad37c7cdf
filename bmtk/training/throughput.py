"""How fast a run is: tokens per second, and model FLOPs utilisation (MFU).

MFU is the floating-point operations that the model needs per second at the observed speed, over the most that the
devices can do (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).  Recomputed activations do not count as work.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from .protocols import Batch
from .updates import can_skip_logits, on_device

# Dense 16-bit matrix FLOP/s with 32-bit accumulation, from the makers' data sheets.  The first name that the device's
# name contains is taken, so a longer name stands before a shorter one.
PEAK_16_BIT = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 4080": 97.5e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250": 362e12,
}


def flops_per_token(model: PreTrainedModel, context_length: int, *, scored: float = 1.0) -> float:
    """Floating-point operations that one token costs in training: 6 N + 12 layers x heads x head size x context.

    N counts the parameters that take part in matrix products: lookup tables do not, an output head does, also where
    the two share one table, for the share of tokens that are `scored`.  The second term is attention, counted without
    a causal discount; a trunk without attention heads has none.  Source: Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = [] if (found := model.get_output_embeddings()) is None else [found.weight]
    matrices: float = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and p not in {*tables, *head})
    matrices += sum(scored * weight.numel() for weight in head)
    return 6.0 * matrices + 12.0 * _attention_width(model.config) * context_length


def _attention_width(config: Any) -> int:
    """Layers x heads x head size; 0 where the configuration names no attention heads."""
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return 0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(layers * heads * head_size)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one device can do in matrix products of `dtype`.

    16-bit types on a CUDA device of a known name: the data sheet.  Everything else is measured (about half a second):
    the best of many products of two matrices of several sizes, with the threads that torch uses in this process.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in PEAK_16_BIT.items() if part in name]
        if known:
            return known[0]
    return _measured_flops(device, dtype)


def _measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.08) -> float:
    """The best of many products; `seconds` is for those of one size.

    Which size is fastest differs between CPUs, types and numbers of threads; short products miss, now and then, what
    else the machine does.
    """
    return max(_flops_of(multiply, device, dtype, seconds) for multiply in _products(device, dtype))


def _products(device: torch.device, dtype: torch.dtype) -> list[Callable[..., Any]]:
    """Ways to multiply two matrices into a third: new memory would take time, too."""
    ways: list[Callable[..., Any]] = [lambda left, right, out: torch.mm(left, right, out=out)]
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # oneDNN, by which models multiply where MKL, which torch calls, is slower; it always takes new memory.
        ways.append(lambda left, right, out: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    return ways


def _flops_of(multiply: Callable[..., Any], device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    best = 0.0
    for size in (384, 512, 1024, 2048) if device.type == "cpu" else (8192,):
        left, right, found = torch.ones(3, size, size, dtype=dtype, device=device)
        deadline, rounds, elapsed = time.perf_counter() + seconds, 0, float("inf")
        while rounds < 3 or time.perf_counter() < deadline:
            started = time.perf_counter()
            multiply(left, right, found)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed, rounds = min(elapsed, time.perf_counter() - started), rounds + 1
        best = max(best, 2.0 * size**3 / elapsed)
        if 8 * elapsed > seconds:  # what the next size would take
            break
    return best


class Meter:
    """A stop watch of training time, which leaves pauses out, and the speeds that follow from it.

    flops_per_unit and peak_flops (of all devices of the run together) may be None: then there is no MFU.  A peak that
    is a function is measured when the first MFU needs it: the first step need not wait for it.
    """

    def __init__(
        self,
        flops_per_unit: float | None = None,
        peak_flops: float | Callable[[], float] | None = None,
        *,
        unit: str = "tokens",
        seconds: float = 0.0,
    ):
        self.flops_per_unit, self.unit = flops_per_unit, unit
        self._peak = peak_flops
        self._before = seconds  # training seconds until the last lap
        self._lap_started = time.perf_counter()

    @cached_property
    def peak_flops(self) -> float | None:
        """That of all devices of the run together."""
        return self._peak() if callable(self._peak) else self._peak

    @property
    def seconds(self) -> float:
        """Training seconds so far, with those given at the start."""
        return self._before + time.perf_counter() - self._lap_started

    def start(self, seconds: float = 0.0) -> None:
        """Start anew, with `seconds` of training already done."""
        self._before, self._lap_started = seconds, time.perf_counter()

    def lap(self, units: int, *, warms_up: bool = False) -> dict[str, float]:
        """Speeds since the last lap, in which all processes together trained on `units`; no MFU if it `warms_up`."""
        now = time.perf_counter()
        elapsed = max(now - self._lap_started, 1e-9)
        self._before, self._lap_started = self._before + elapsed, now
        if warms_up:
            return self._speeds(units / elapsed, with_mfu=False)
        with self.paused():  # a peak is measured, if it was not
            return self._speeds(units / elapsed)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time that the body takes."""
        started = time.perf_counter()
        yield
        self._lap_started += time.perf_counter() - started

    def of_run(self, units: int, seconds: float) -> dict[str, float | None]:
        """Mean speeds of a whole run, and what they are measured against."""
        speeds = self._speeds(units / max(seconds, 1e-9))
        singular = self.unit.removesuffix("s")
        return {**speeds, f"flops_per_{singular}": self.flops_per_unit, "peak_flops": self.peak_flops}

    def _speeds(self, units_per_second: float, *, with_mfu: bool = True) -> dict[str, float]:
        speeds = {f"{self.unit}_per_second": units_per_second}
        if with_mfu and self.flops_per_unit and self.peak_flops:
            speeds["mfu"] = units_per_second * self.flops_per_unit / self.peak_flops
        return speeds


def build_meter(model: PreTrainedModel, unit: str, row: Batch, accelerator: Accelerator) -> Meter:
    """Return the meter of a run: it knows what the model needs and what all its devices together can do.

    `row` is a batch of one row, of which the operations are counted where a unit is not a token.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)

    def peak() -> float:
        return accelerator.num_processes * peak_flops(accelerator.device, dtype)

    # Of a GPU before the first step: later its memory may be full.
    return Meter(flops_per_unit(model, unit, row), peak if accelerator.device.type == "cpu" else peak(), unit=unit)


def flops_per_unit(model: PreTrainedModel, unit: str, row: Batch) -> float:
    """Floating-point operations that a token, or a row, costs in training; `row` is a batch of one row."""
    if unit != "tokens":
        return flops_per_row(model, row)
    scored = (row["labels"] != -100).float().mean().item() if can_skip_logits(model) else 1.0
    return flops_per_token(model, row["input_ids"].shape[1], scored=scored)


@torch.no_grad()
def flops_per_row(model: PreTrainedModel, row: Batch) -> float:
    """Floating-point operations that one row costs in training: three times those of its forward pass.

    Counted where torch can (matrix products, convolutions, attention); recurrent kernels are not among them.
    """
    was_training = model.training
    model.eval()
    inputs = {name: value for name, value in on_device(row, model.device).items() if name != "labels"}
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    model.train(was_training)
    return 3.0 * counter.get_total_flops()
