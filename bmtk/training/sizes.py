"""One dial: what follows from the size of a language model, as closed formulas.

N parameters, V tokens of the vocabulary, D tokens of training, B tokens of an optimizer step.  `docs/sizes.md` has the
sources, and what was measured.  Nothing here needs a model or data; `dial.py` applies it to them.
"""

import dataclasses
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from bmtk.errors import UserError
from bmtk.settings import setting

SMALLEST, LARGEST = 1e5, 1e10  # parameters
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 512, 32768
WIDTHS = (*range(32, 256, 32), *range(256, 8193, 64))
PULL = 0.2  # how much a depth beside the curve counts, against a number of parameters beside the size
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022, arXiv:2203.15556
EPOCHS = 4  # that are about as good as new text: Muennighoff et al. 2023, arXiv:2305.16264
BYTES_PER_PARAMETER = 15  # of text: 20 tokens of 3 bytes, read 4 times
# What a family is made of, besides width and depth.
SHAPES: dict[str, dict[str, object]] = {
    "bm_cnn": {"input_type": "tokens", "block_type": "gated"},
    "bm_rnn": {"cell_type": "mingru", "residual": True, "norm_type": "rms_norm"},
    "bm_transformer": {"qk_norm": True},
}
TRAINING: dict[str, object] = {"optimizer": "muon", "schedule": "linear"}
# Muon's rate is the same for all sizes: an update of bounded spectral norm changes the outputs of wide and of narrow
# layers alike (Yang et al. 2023, arXiv:2310.17813).  Which one was measured (docs/sizes.md).
MUON_RATES = {"bm_cnn": 0.02, "bm_rnn": 0.04, "bm_transformer": 0.02}
MOST_TOKENS_AT_ONCE = 16384  # of a process's forward pass; more keep no device busier


@dataclass
class SizeArguments:
    """One dial for a new language model, and how long it may train."""

    _argument_group_name = "size"

    size: str | None = setting(
        None,
        "parameters of a new language model (10M), from which all else follows; default: none",
    )
    budget: str | None = setting(
        None,
        "longest time of training: 90s, 5min, 2h; the steps follow from it; default: no limit",
    )

    # Raw values of the file and the command line, which win over what follows from the size.
    given: Mapping[str, object] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)
    # What has followed from them, as it is kept for a resumed run: "architecture", "training".
    derived: dict[str, Any] | None = dataclasses.field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _ = self.parameters, self.seconds

    @property
    def parameters(self) -> float | None:
        return parameters_of(self.size)

    @property
    def seconds(self) -> float | None:
        """Of the budget.  Raises: UserError if it is no time."""
        if self.budget is None:
            return None
        found = re.fullmatch(r"(\d+\.?\d*)\s*(s|min|h)", self.budget.strip())
        if not found or float(found[1]) == 0:
            raise UserError(f"budget={self.budget!r} is no time; give a number with s, min or h, such as 90s or 5min")
        return float(found[1]) * SECONDS[found[2]]


def parameters_of(size: object) -> float | None:
    """The number that `size` names, "1M"; None stands for no size.  Raises: UserError if it is no size."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+\.?\d*)([KMB])", str(size).strip().upper())
    if not found:
        raise UserError(f"size={size!r} is no number of parameters; give one such as 1M, 10M, 100M or 1B")
    parameters = float(found[1]) * UNITS[found[2]]
    if not SMALLEST <= parameters <= LARGEST:
        raise UserError(f"size={size} is out of range; give a size from 100K to 10B")
    return parameters


# Shape -------------------------------------------------------------------------------------------------------------


def vocabulary_for(parameters: float, text_bytes: float | None = None) -> int:
    """Tokens of a vocabulary whose table takes some 15 % of the parameters: 1024 (N / 1M)^0.6, a power of two.

    The table grows slower than the rest (Tao et al. 2024, arXiv:2407.13623: V x width as the rest^0.83).  A text of
    `text_bytes` that is too short for N has the vocabulary of the size that it suffices for.
    """
    if text_bytes is not None:
        parameters = min(parameters, text_bytes / BYTES_PER_PARAMETER)
    return min(max(_power_of_two(1024 * (parameters / 1e6) ** 0.6), SMALLEST_VOCABULARY), LARGEST_VOCABULARY)


def context_for(parameters: float) -> int:
    """Tokens of a row: 256 (N / 1M)^0.3, a power of two, so that 100M read 1,024 (GPT-2) and 1B 2,048 (Llama)."""
    return _power_of_two(256 * (parameters / 1e6) ** 0.3)


def _power_of_two(number: float) -> int:
    return int(2 ** round(math.log2(number)))


def depth_for(width: int) -> float:
    """Layers of a model of `width`: 4 (width / 128)^0.6, the curve through (128, 4), GPT-2's (768, 12), (2048, 21).

    A shape beside it costs little (Kaplan et al. 2020, arXiv:2001.08361, section 3.1).
    """
    return float(4 * (width / 128) ** 0.6)


def heads_for(width: int) -> int:
    """Heads of 64, below a width of 256 of 32."""
    return max(1, width // (64 if width >= 256 else 32))


def fitted_shape(
    parameters: float, count: Callable[[int, int], int], *, width: int | None, depth: int | None, heads: int | None
) -> tuple[int, int]:
    """Width and depth near the curve of `depth_for` whose model has about `parameters`; those given are kept.

    `count(width, depth)` counts the parameters of a model, which grow by the same number with every layer.
    """
    widths = [width] if width else [each for each in WIDTHS if each % (heads or 1) == 0] or [heads or 1]

    @cache
    def of_layers(width: int) -> tuple[int, int]:
        """Parameters without any layer, and of one."""
        one = count(width, 1)
        layer = count(width, 2) - one
        return one - layer, layer

    def needed(width: int) -> float:
        rest, layer = of_layers(width)
        return (parameters - rest) / layer

    def misfit(width: int) -> float:
        rest, layer = of_layers(width)
        layers = depth or max(1, round(needed(width)))
        off_curve = 0.0 if depth else abs(math.log(layers / depth_for(width)))
        return abs(math.log((rest + layers * layer) / parameters)) + PULL * off_curve

    crossing = bisect_left(widths, True, key=lambda width: needed(width) <= (depth or depth_for(width)))
    best = min(widths[max(0, crossing - 2) : crossing + 2] or widths[-1:], key=misfit)
    return best, depth or max(1, round(needed(best)))


# Training ------------------------------------------------------------------------------------------------------------


def batch_for(tokens: float) -> float:
    """Tokens of an optimizer step: 0.58 D^0.571, whatever the model (Li et al. 2025, arXiv:2503.04715, Step Law)."""
    return float(0.58 * tokens**0.571)


def tokens_of_steps(steps: int) -> float:
    """D of a number of steps with the batch that follows from D."""
    return float((0.58 * steps) ** (1 / (1 - 0.571)))


def learning_rate_for(trunk: float, tokens: float) -> float:
    """Peak learning rate of AdamW for all weights: 1.79 N^-0.713 D^0.307 (Step Law, as above).

    `trunk`: N without lookup tables and output head, as there.
    """
    return float(1.79 * trunk**-0.713 * tokens**0.307)


def table_rate_for(width: int) -> float:
    """Peak learning rate of AdamW beside Muon, for tables and norms: 0.01 (128 / width)^0.5 (docs/sizes.md)."""
    return float(0.01 * (128 / width) ** 0.5)


def tokens_for(parameters: float, in_data: float) -> tuple[float, str]:
    """Tokens to train on, and why as many: 20 a parameter, or fewer where these were more than EPOCHS of the data."""
    wanted, most = TOKENS_PER_PARAMETER * parameters, EPOCHS * in_data
    if wanted <= most:
        return wanted, f"{TOKENS_PER_PARAMETER} a parameter"
    return most, (
        f"{EPOCHS} times the {shown_count(in_data)} that the data have, and {most / parameters:.2g} a parameter; "
        f"{TOKENS_PER_PARAMETER} a parameter would be {shown_count(wanted)}: more text, or a smaller size"
    )


def shown_count(number: float) -> str:
    """A count with three digits: 1.01M."""
    for letter, unit in reversed(UNITS.items()):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


# Settings ------------------------------------------------------------------------------------------------------------


class Values(Protocol):
    """What is read of the values of file and command line."""

    derived: dict[str, object]

    @property
    def given(self) -> Mapping[str, object]: ...

    def keep_data_of_default_file(self, of_task: Any) -> None: ...

    def get(self, key: str, default: object = None) -> object: ...


def fill_by_size(values: Values, model_type: str, of_task: Any) -> None:
    """Fill in what follows from `size` alone: context and output folder, unless they are given.

    Of the recipe's default file only the data stay: nobody has given its model and its training by hand.
    `of_task` is the dataclass of the task's data.  Raises: UserError where a size does not go with the run.
    """
    if values.get("budget") is not None and str(values.get("num_train_steps", -1)) != "-1":
        raise UserError(
            f"budget={values.get('budget')} and num_train_steps={values.get('num_train_steps')} both say how long to "
            "train; leave one out (--num_train_steps null unsets that of a config file)"
        )
    parameters = parameters_of(values.get("size"))
    if parameters is None:
        return
    _check_new_language_model(values, model_type, of_task)
    values.keep_data_of_default_file(of_task)
    name = f"outputs/{model_type}-{values.get('size')}"
    values.derived = {"context_length": context_for(parameters), "output_dir": name}


def _check_new_language_model(values: Values, model_type: str, of_task: Any) -> None:
    size = values.get("size")
    for name in ("model", "preset_model"):
        if values.get(name) is not None:
            raise UserError(f"size={size} makes a new shape, and {name}={values.get(name)} has its own; leave one out")
    if model_type not in SHAPES:
        raise UserError(f"size={size} knows the shapes of {', '.join(SHAPES)}, not of model_type={model_type}")
    if not {"vocab_size", "context_length"} <= {f.name for f in dataclasses.fields(of_task)}:
        raise UserError(f"size={size} counts in tokens, and this task reads none; set its shape by hand")
