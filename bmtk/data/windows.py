"""Windows of series: T steps of context, H steps of forecast, C columns, F time features, W windows, B rows.

Sources of the augmentations: window slicing, Le Guennec et al. 2016, "Data augmentation for time series classification
using convolutional neural networks"; jittering, Um et al. 2017, arXiv:1706.00527.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from .epoch_dataset import EpochDataset
from .rows import Indices
from .series import Series, calendar_features


@dataclass
class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Every window of `context` + `horizon` steps whose forecast lies in given ranges of some series.

    A row is a window with all its columns or, if `alone`, one column of it: row w * C + c is column c of window w.
    `values` (all steps of all series, C) are standardised; `filled` are the same without gaps, each of which holds the
    last value before it.  `starts` (W,) are the first steps that are forecast.
    """

    values: np.ndarray
    filled: np.ndarray
    features: np.ndarray | None
    starts: np.ndarray
    context: int
    horizon: int
    alone: bool
    fills: bool  # whether the context is read from `filled`, as if nothing were missing
    has_gaps: bool
    has_future: bool

    def __len__(self) -> int:
        return len(self.starts) * (self.values.shape[1] if self.alone else 1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.batch([index]).items()}

    def __getitems__(self, indices: Indices) -> dict[str, torch.Tensor]:
        """What a DataLoader asks for: a batch already, which a collator leaves as it is."""
        return self.batch(indices)

    def batch(
        self, indices: Indices, epochs: Indices = (), *, pace: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        """past_* (B, T, C or F), future_* (B, H, C or F), masks only where something is missing.

        `pace` (B,), at most 1, is the time between two steps of each row, counted from the last step of its context;
        values between two steps are interpolated.
        """
        windows, column = np.asarray(indices), None
        if self.alone:
            windows, column = np.divmod(windows, self.values.shape[1])
        now = self.starts[windows][:, None] - 1
        past, future = np.arange(1 - self.context, 1), np.arange(1, self.horizon + 1)
        if pace is not None:
            past, future = pace[:, None] * past, pace[:, None] * future
        past, future = now + past, now + future
        batch = self._masked("past", _read(self.filled if self.fills else self.values, past, column))
        if self.has_future:
            batch |= self._masked("future", _read(self.values, future, column))
        if self.features is not None:
            batch |= {
                "past_time_features": _read(self.features, past),
                "future_time_features": _read(self.features, future),
            }
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _masked(self, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
        if not self.has_gaps:
            return {f"{name}_values": values}
        missing = np.isnan(values)
        return {
            f"{name}_values": np.where(missing, np.float32(0), values),
            f"{name}_observed_mask": (~missing).astype(np.float32),
        }

    def truth(self) -> np.ndarray:
        """(W, H, C), NaN where missing."""
        return self.values[self.starts[:, None] + np.arange(self.horizon)]

    def repeated(self, season: int) -> np.ndarray:
        """The naive forecasts (W, H, C): the last `season` steps of the context over and over."""
        return self.filled[self.starts[:, None] - season + np.arange(self.horizon) % season]

    def by_window(self, forecasts: np.ndarray) -> np.ndarray:
        """(rows, H, C of a row, ...) -> (W, H, C, ...)."""
        if not self.alone:
            return forecasts
        shape = (len(self.starts), self.values.shape[1], *forecasts.shape[1:])
        return np.moveaxis(forecasts.reshape(shape)[:, :, :, 0], 1, 2)


@dataclass
class ChangedWindows(EpochDataset):
    """`rows` that differ in every epoch: an augmentation.

    The past gets noise of deviation `jitter` (in standardised units), and a window shows up to the share `cut` less
    time, stretched over its steps.  Both depend on the seed, the epoch and the row only.
    """

    rows: Windows
    jitter: float
    cut: float
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Indices) -> dict[str, torch.Tensor]:
        return self.batch(indices, [self.epoch] * len(indices))

    def batch(self, indices: Indices, epochs: Indices) -> dict[str, torch.Tensor]:
        draws = [
            np.random.default_rng([self.seed, int(epoch), int(index)])
            for epoch, index in zip(epochs, indices, strict=True)
        ]
        pace = 1 - self.cut * np.array([draw.random() for draw in draws]) if self.cut else None
        batch = self.rows.batch(indices, pace=pace)
        if self.jitter:
            past = batch["past_values"]
            noise = np.stack([draw.standard_normal(past.shape[1:], dtype=np.float32) for draw in draws])
            batch["past_values"] = past + self.jitter * torch.from_numpy(noise) * batch.get("past_observed_mask", 1)
        return batch


def _read(values: np.ndarray, steps: np.ndarray, column: np.ndarray | None = None) -> np.ndarray:
    """Of values (steps, C): (B, L, C) at `steps` (B, L), or (B, L, 1) of one column (B,) each."""
    if not np.issubdtype(steps.dtype, np.integer):
        before = np.floor(steps).astype(np.int64)
        weight = (steps - before)[..., None].astype(values.dtype)
        after = np.where(weight[..., 0] > 0, before + 1, before)
        return (1 - weight) * _read(values, before, column) + weight * _read(values, after, column)
    return values[steps] if column is None else values[steps, column[:, None]][..., None]


def filled_forward(values: np.ndarray) -> np.ndarray:
    """Gaps (NaN) of (steps, C) hold the last value before them; 0 if there is none."""
    return pd.DataFrame(values).ffill().fillna(0.0).to_numpy(values.dtype)


def windows_of(
    ranges: Sequence[tuple[Series, int, int]],
    *,
    scaling: Mapping[str, Sequence[float]],
    context: int,
    horizon: int,
    time_features: Sequence[str],
    has_future: bool = True,
    **options: bool,
) -> Windows:
    """The windows whose forecasts lie within `first` to `last` (exclusive) of each (series, first, last).

    Without a future: the window of each series that begins where it ends.
    """
    parts, starts, steps = [], [], 0
    has_gaps = any(np.isnan(series.values).any() for series, *_ in ranges)
    for series, first, last in ranges:
        if has_future:
            starts.append(steps + np.arange(max(first, context), last - horizon + 1))
        else:
            starts.append(np.array([steps + len(series)]))
            series = series.extended(horizon)
        parts.append(series)
        steps += len(series)
    mean, std = np.array(scaling["mean"]), np.array(scaling["std"])
    values = [((part.values - mean) / std).astype(np.float32) for part in parts]
    features = [calendar_features(part.times, time_features) for part in parts] if time_features else None
    return Windows(
        np.concatenate(values),
        np.concatenate([filled_forward(part) for part in values]),
        None if features is None else np.concatenate(features),
        np.concatenate(starts),
        context,
        horizon,
        has_gaps=has_gaps,
        has_future=has_future,
        **options,
    )
