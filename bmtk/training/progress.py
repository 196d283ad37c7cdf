"""Progress bars that are lines of a log where there is no terminal, and evaluations in one line."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 20.0  # between two lines of a log
FEW_STEPS = 400  # below about so many optimizer steps a new model has hardly begun to learn


class Bar(tqdm):  # type: ignore[type-arg]
    """tqdm in a terminal; elsewhere one line each `LINE_SECONDS`, and one at the end, instead of carriage returns."""

    def __init__(self, *args: Any, **options: Any):
        if not sys.stderr.isatty():
            options = {**options, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "ascii": True}
            options |= {
                "ncols": 100,
                "dynamic_ncols": False,
                "delay": 0 if options.get("leave", True) else LINE_SECONDS,
            }
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What tqdm shows its state with."""
        if file.isatty():
            shown: Callable[[str], None] = tqdm.status_printer(file)
            return shown

        def print_line(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return print_line


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """Metrics such as `validation/loss` in words: "step 20: validation loss 0.6931"."""
    names = (key.replace("/", " ").replace("_", " ") for key in metrics)
    counted = (
        f"{value:,.0f}" if value >= 1000 and float(value).is_integer() else f"{value:.4f}"
        for value in metrics.values()
    )
    words = map(" ".join, zip(names, counted, strict=True))
    return f"step {step}: {', '.join(words)}"


def few_steps_note(steps: int, epochs: float) -> str:
    """A hint where a run is so short that a new model stays at chance; "" for a run of `FEW_STEPS` and more."""
    if steps >= FEW_STEPS:
        return ""
    longer = max(1, round(epochs * FEW_STEPS / max(steps, 1)))
    return (
        f"{steps:,} optimizer steps are few: a new model may stay at chance below about {FEW_STEPS}; "
        f"num_train_epochs={longer} or a smaller batch_size makes more of them"
    )
