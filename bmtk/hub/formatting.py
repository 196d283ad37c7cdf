"""How metrics, numbers, durations and texts of unknown origin are written, in Markdown and elsewhere."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

SPEEDS = frozenset("epoch runtime samples_per_second steps_per_second model_preparation_time".split())
BASELINES = {  # prefixes of metrics of a baseline without a model, and the baseline in words
    "naive_": "last value",
    "seasonal_naive_": "last season",
    "mean_colour_": "mean colour",
    "majority_": "majority class",
    "chance_": "chance",
    "best_sentence_": "best sentence",
    "mean_value_": "mean value",
}
LOWER_IS_BETTER = re.compile(
    r"(?:.*_)?(?:loss|mse|mae|rmse|mape|smape|mase|wer|cer|perplexity|ppl|error|quantile_loss|bits_per_byte)"
)
# Settings whose 0 says that something is off, or is decided by another setting.
ZERO_IS_UNSET = frozenset(
    "micro_batch_size eval_steps save_steps early_stopping_patience ema_decay l1_penalty unfreeze_epochs max_steps "
    "save_total_limit".split()
)
# Parts of a metric's name that are shown with another spelling.
SPELLED = {
    **{part: part.upper() for part in "ap bleu cer f1 mae mape mase mse rmse smape wer".split()},
    **{"chrf": "chrF", "macro": "macro-", "map": "mAP", "micro": "micro-", "r2": "R²", "top5": "top-5"},
}
COUNTS = frozenset("tokens rows items samples documents".split())  # how much was evaluated


def escape_markdown(value: object) -> str:
    """Return one line of Markdown that shows `value` literally, in a paragraph or in a table cell."""
    text = re.sub(r"([\\`*\[\]|#~$!])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", one_line(value))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fence(value: object, language: str = "text") -> str:
    """Return a fenced code block which no run of backticks in `value` can close."""
    longest = max((len(run) for run in re.findall("`+", str(value))), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{value}\n{ticks}"


def one_line(value: object) -> str:
    """Return `value` as a text without line breaks, at most 200 characters long."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"


def slug(value: object) -> str:
    """Return `value` as an identifier of letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]+", "-", one_line(value), flags=re.ASCII).strip("-")


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a JSON number (NaN is; true and false are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_positive(value: object) -> TypeGuard[float]:
    """Whether `value` is a number above zero."""
    return is_number(value) and value > 0


def split_metric(key: str) -> tuple[str, str]:
    """Split `validation/loss` or `eval_loss` into the split ("" when the key names none) and the metric."""
    match = re.fullmatch(r"(validation|eval|test|train)[/_](.+)", key)
    return ("validation" if match[1] == "eval" else match[1], match[2]) if match else ("", key)


def is_quality(key: str) -> bool:
    """Whether a metric measures the quality of the model, rather than the speed or the size of the evaluation."""
    return split_metric(key)[1] not in SPEEDS | COUNTS


def is_baseline(key: str) -> bool:
    """Whether a metric is that of a baseline, which the model is compared with."""
    return split_metric(key)[1].startswith(tuple(BASELINES))


def is_chosen(key: str, value: object) -> bool:
    """Whether a setting has a value of its own: neither none, nor "auto", nor a number that stands for either."""
    if value is None or value in ("auto", [], {}):
        return False
    return not is_number(value) or (value != -1 and not (value == 0 and key in ZERO_IS_UNSET))


def metric_label(key: str) -> str:
    """Return `validation/macro_f1` as "Validation macro-F1"."""
    split, metric = split_metric(key)
    words = " ".join(SPELLED.get(part, part) for part in metric.split("_")).replace("- ", "-")
    return f"{split.capitalize()} {words}" if split else words[:1].upper() + words[1:]


def speed_of(throughput: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the unit of a speed ("tokens per second") and its value; None where no speed was recorded."""
    found = ((key, value) for key, value in throughput.items() if key.endswith("_per_second") and is_number(value))
    return next(((key.replace("_", " "), value) for key, value in found), None)


def format_number(value: float) -> str:
    """Return a number as a reader wants it: grouped when whole, four significant digits otherwise."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0*", lambda match: f"e{match[1].replace('+', '')}", f"{value:.4g}")


def plural(unit: str, count: float) -> str:
    """Return the plural `unit`, or its singular for a count of one."""
    return unit.removesuffix("s") if count == 1 else unit


def format_compact(value: float) -> str:
    """Return a count in three significant digits with its power of a thousand: 4.92 M."""
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if is_number(value) and math.isfinite(value) and abs(value) >= size * 0.9995:
            return f"{float(f'{value / size:.3g}'):g}{suffix}"
    return format_number(value) if is_number(value) else one_line(value)


def format_seconds(seconds: float) -> str:
    """Return a duration in its two largest units: 2 min 31 s."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{format_number(round(seconds, 1) if math.isfinite(seconds) else seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def show(value: object) -> str:
    """Return a configuration value as it would be typed."""
    if isinstance(value, str):
        return value
    return ", ".join(map(show, value)) if isinstance(value, list) else json.dumps(value, ensure_ascii=False)
