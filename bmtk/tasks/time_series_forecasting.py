"""Time-series forecasting: from T steps of some columns of a table, the next H.  C columns.

Values are standardised by the training rows; the mean and deviation of each column travel in the model's configuration
(`config.series`), so that predictions are in the units of the data.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from datasets import Dataset
from scipy.special import stdtrit
from transformers import AutoModelForTimeSeriesPrediction

from bmtk.data.labels import some
from bmtk.data.series import (
    CALENDAR,
    Series,
    bounds,
    numeric_columns,
    read_series,
    scaling_of,
    shared_steps,
    times_after,
    usual_season,
)
from bmtk.data.tables import SPLITS, check_column, one_table, read_splits, read_table
from bmtk.data.windows import ChangedWindows, Windows, windows_of
from bmtk.metrics.forecasts import column_errors, quantile_scores, scores
from bmtk.settings import setting

from . import forecasts
from .task import DataArguments, Prediction, Task, mean_loss

GAPS = ("stop", "fill", "mask")
USUAL_SPLIT = (0.7, 0.1, 0.2)
NO_TIMES = "none"
SHOWN = 8  # steps of a sample
FUTURE = ("future_values", "future_observed_mask")


@dataclass
class TimeSeriesForecastingArguments(DataArguments):
    """Which columns, and which rows train, validate and test."""

    _argument_group_name = "data of time_series_forecasting"

    time_column: str = setting("date", "column of the time stamps; none: the rows are in order and have none")
    target_columns: list[str] | None = setting(None, "columns to forecast; default: all that hold numbers")
    id_column: str | None = setting(None, "column that names the series of a row, where a table holds several")
    split_rows: list[float] | None = setting(
        None,
        "how one table is split, in order of time: rows of training, validation and test, or shares [0.7 0.1 0.2]; "
        "the first windows of a part look back into the part before it",
    )
    missing_values: str = setting(
        "stop",
        "what is no number: stop, fill (read the value before it) or mask (tell the model); never a target of loss "
        "or metrics",
    )
    time_features: list[str] | None = setting(
        None, f"what the model is told of each time stamp: {', '.join(CALENDAR)}; default: nothing"
    )
    season: int | None = setting(None, "steps of a season, for naive forecasts and MASE; default: a day, week or year")
    jitter: float = setting(
        0.0, "training windows see the past with noise of so many deviations of its column (of the training rows)"
    )
    window_slice: float = setting(
        0.0, "training windows show up to so much less time, stretched over all their steps (0.1: 10 %)"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.group_column:
            raise ValueError(f"group_column={self.group_column!r}: of series the end is held out; leave it out")
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"jitter={self.jitter} is out of range; give a number of at least 0 (0.1)")
        if not 0 <= self.window_slice < 1:
            raise ValueError(
                f"window_slice={self.window_slice} is out of range; give a share of at least 0 and below 1"
            )
        if self.missing_values not in GAPS:
            raise ValueError(f"missing_values={self.missing_values!r} is unknown; choose one of {', '.join(GAPS)}")
        if unknown := set(self.time_features or ()) - CALENDAR.keys():
            raise ValueError(
                f"time_features has {', '.join(sorted(unknown))}, which is unknown; choose among {', '.join(CALENDAR)}"
            )
        if self.time_features and self.time_column == NO_TIMES:
            raise ValueError("time_features are read from time stamps, and time_column is none; leave one of them out")
        if self.season is not None and self.season < 1:
            raise ValueError(f"season={self.season} must be at least 1 step")
        shares = self.split_rows
        if shares and (
            min(shares) < 0 or not 2 <= len(shares) <= 3 or shares[0] == 0 or sum(shares) > 1 >= max(shares)
        ):
            raise ValueError(
                f"split_rows={shares} must be two or three numbers for training, validation and test: rows, or shares "
                "that make 1 at most"
            )


class TimeSeriesForecasting(Task):
    """Windows of series.  A model with num_input_channels=1 forecasts each column alone; with C, all together.

    The rows of a window that is forecast column by column are its columns; an item of the loss is an observed value.
    """

    name = "time_series_forecasting"
    about: ClassVar[dict[str, str | None]] = {
        "pipeline_tag": "time-series-forecasting",
        "auto_class": "AutoModelForTimeSeriesPrediction",
        "processor_class": None,
        "noun": "forecaster of time series",
        "loss_unit": "",
        "limits": "It continues what it has seen: a change in how the series come about, or in how they are measured, "
        "makes its forecasts wrong without a sign.",
    }
    arguments = TimeSeriesForecastingArguments
    auto_class = AutoModelForTimeSeriesPrediction
    unit = "windows"
    main_metric = "mse"
    cuts_one_table = True
    processor = None  # what belongs to the data is in the configuration

    @classmethod
    def incomparable(cls, args: TimeSeriesForecastingArguments, metric: str) -> dict[str, str]:
        """Architecture fields are among them.  Windows of one table look back into the part before their own."""
        found = {
            "id_column": "decides which values are measured",
            "prediction_length": "decides how far ahead is forecast, and the farther, the harder",
        }
        if metric == "mase":
            found["season"] = "decides which naive forecast the errors are divided by"
        if metric == "loss":
            found["series_loss"] = "decides what the loss is"
        if args.validation_file or (args.dataset and not one_table(args.dataset)):
            found["context_length"] = "decides with which row of the validation table the first forecast begins"
        return found

    # ------------------------------------------------------------------------------------------------ rows

    def _tables(self, splits: Sequence[str]) -> dict[str, Dataset]:
        """One table stands for all the splits that it is cut into; else each has a table of its own."""
        args = self.args
        self.cuts: dict[str, int] = {}  # split -> its place among the `shares` of the table that it is cut from
        files = one_table(args.dataset) if args.dataset else args.train_file
        if not splits or not files or args.validation_file or args.test_file:
            return self._tables_of_splits(splits)
        table = read_table([Path(name).expanduser() for name in files])
        self.shares = args.split_rows or USUAL_SPLIT
        self.cuts = {split: place for place, split in enumerate(SPLITS[: len(self.shares)]) if self.shares[place]}
        if args.split_rows is None:
            self.notes.append(f"one table: {_percent(USUAL_SPLIT)} of it train, validate and test, in order of time")
        return {split: table for split in splits if split in self.cuts}

    def _tables_of_splits(self, splits: Sequence[str]) -> dict[str, Dataset]:
        args = self.args
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        if not splits or not (args.dataset or any(files.values())):
            return super()._tables(splits)  # nothing, or an error that says what to set
        tables = read_splits(args.dataset, files=files, splits=splits)
        if "train" in tables and "validation" in splits and "validation" not in tables:
            self.shares = (1 - args.validation_fraction, args.validation_fraction)
            self.cuts = {"train": 0, "validation": 1}
            tables["validation"] = tables["train"]
            share = _percent(self.shares[1:])
            self.notes.append(f"there are no validation rows: the last {share} of the training rows are held out")
        return tables

    def read_rows(self, table: Dataset, where: str, *, labelled: bool) -> Dataset:
        """The whole table: which of its columns are read is known when the model is."""
        for option in ("time_column", "id_column"):
            name = getattr(self.args, option)
            if name not in (None, NO_TIMES):
                check_column(table, name, option=option, where=where)
        return table

    def _keep_apart(self) -> None:
        """Windows of one table overlap in their context only; other tables are looked at by `configure`."""

    @property
    def config_fields(self) -> dict[str, object]:
        """Each column alone, unless num_input_channels says otherwise."""
        features = 2 * len(self.args.time_features or ())
        return {"input_type": "series", "num_input_channels": 1, "num_time_features": features}

    def configure(self, config, **options) -> None:
        """Learn columns, scale and season from the training rows, or take the model's own; they become config.series.

        Raises: ValueError if the model reads no series, or others than these.
        """
        kind = getattr(config, "input_type", None)
        if kind != "series":
            raise ValueError(f"a {config.model_type} of input_type={kind!r} forecasts no series; it needs 'series'")
        self.context, self.horizon = config.context_length, config.prediction_length
        self.levels = list(config.quantiles) if config.series_loss in ("quantile", "student_t") else []
        self.read: dict[int, tuple[Dataset, list[Series]]] = {}
        self.known = self._of_model(config)
        if "train" in self.rows:
            self.known = self._learn(self.known.get("time_features"))
            config.series = self.known
        elif not self.known:
            raise ValueError(
                f"the configuration of {self.model} has no `series` (columns, mean, std): another task trained it"
            )
        self._check(config)
        super().configure(config)

    def _of_model(self, config) -> dict[str, object]:
        """What a trained model knows of its series; the configuration of an adapter is that of its base."""
        if self.model and (Path(self.model) / "adapter_config.json").is_file():
            run = json.loads((Path(self.model) / "run.json").read_text(encoding="utf-8"))
            return run["data"]["series"]
        return getattr(config, "series", None) or {}

    def _learn(self, time_features: Sequence[str] | None) -> dict[str, object]:
        table, args = self.rows["train"], self.args
        columns, left = args.target_columns or [], []
        if not columns:
            columns, left = numeric_columns(table, {args.time_column, args.id_column})
        if not columns:
            raise ValueError(f"no column of the train data holds numbers; its columns are {some(table.column_names)}")
        if left:
            self.notes.append(f"not forecast, as fewer than half of the cells are numbers: {some(left)}")
        features = args.time_features if args.time_features is not None else time_features
        self.known = {"columns": list(columns), "time_features": list(features or ())}
        self._keep_steps_apart()
        ranges = self._ranges(table, "train")
        season = args.season or usual_season(ranges[0][0].times)
        self._say_what_is_left(ranges)
        return {**self.known, "season": season, **scaling_of(ranges, season, self.columns)}

    def _say_what_is_left(self, ranges: Sequence[tuple[Series, int, int]]) -> None:
        left = sum(len(series) - bounds(len(series), self.shares)[-1][1] for series, *_ in ranges if self.cuts)
        if left:
            self.notes.append(f"split_rows leaves {left:,} rows at the end unused")

    def _check(self, config) -> None:
        features = self.known["time_features"]
        if config.num_input_channels not in (1, len(self.columns)):
            raise ValueError(
                f"num_input_channels={config.num_input_channels} is neither 1 (each column alone) nor "
                f"{len(self.columns)} (all together: {some(self.columns)})"
            )
        if config.num_time_features != 2 * len(features):
            raise ValueError(
                f"num_time_features={config.num_time_features} does not go with time_features={list(features)}, of "
                f"which each gives a sine and a cosine; leave num_time_features out"
            )
        if features and self.args.time_column == NO_TIMES:
            raise ValueError(f"the model reads {', '.join(features)} of time stamps, and time_column is none")
        self.alone = config.num_input_channels == 1

    @property
    def metrics(self) -> list[str]:
        """MASE where a column has one; quantiles where the model has them.  Naive forecasts are no model's."""
        mase = ["mase"] if any(error > 0 for error in self.known["seasonal_error"]) else []
        quantiles = ["quantile_loss", "weighted_quantile_loss", "coverage"] if self.levels else []
        return ["loss", "mse", "mae", "original_mse", "original_mae", *mase, *quantiles]

    @property
    def columns(self) -> list[str]:
        return self.known["columns"]

    def _ranges(self, table: Dataset, where: str) -> list[tuple[Series, int, int]]:
        """Each series of a table, and the steps of it that are the split `where`."""
        is_cut = where in self.cuts
        if id(table) not in self.read:
            self.read[id(table)] = table, self._series(table, "rows" if is_cut else f"{where} rows")
        ranges = []
        for series in self.read[id(table)][1]:
            first, last = bounds(len(series), self.shares)[self.cuts[where]] if is_cut else (0, len(series))
            if last > len(series):
                shares = ", ".join(f"{share:g}" for share in self.shares)
                name = f"series {series.name!r}" if series.name else "the table"
                raise ValueError(f"split_rows=[{shares}] ends with row {last:,}; {name} has {len(series):,} rows")
            ranges.append((series, first, last))
        return ranges

    def _series(self, table: Dataset, where: str) -> list[Series]:
        args = self.args
        for name in self.columns:
            check_column(table, name, option="target_columns", where=where.removesuffix(" rows"))
        series, notes = read_series(
            table,
            self.columns,
            time_column=None if args.time_column == NO_TIMES else args.time_column,
            id_column=args.id_column,
            may_have_gaps=args.missing_values != "stop",
            where=where,
        )
        self.notes += notes
        return series

    def _keep_steps_apart(self) -> None:
        """See to it that no step is trained on that is measured on, where splits have tables of their own."""
        train = self._ranges(self.rows["train"], "train")
        for split in (split for split, table in self.rows.items() if table is not self.rows["train"]):
            shared = list(shared_steps(self._ranges(self.rows[split], split), train))
            if not shared:
                continue
            found = f"{len(shared):,} of the {split} rows are training rows, too (the first: {shared[0]})"
            if self.args.leakage != "allow":
                raise ValueError(f"{found}; take them out of one of the files, or set leakage=allow")
            self.notes.append(f"{found}: the results on these are not honest")

    def encode(self, rows: Dataset, where: str) -> Windows:
        ranges, is_input = self._ranges(rows, where), where == "input"
        if is_input:
            self.asked = [series for series, *_ in ranges]
        for series, first, last in ranges:
            if last < self.context + (0 if is_input else self.horizon) or last - first < (
                0 if is_input else self.horizon
            ):
                name = f"series {series.name!r} of the {where} rows" if series.name else f"the {where} rows"
                future = "" if is_input else f" and prediction_length={self.horizon} to compare with"
                before = f" (after {first:,} others)" if first else ""
                raise ValueError(
                    f"{name}: {last - first:,} rows{before} are too few for one window; it needs context_length="
                    f"{self.context}{future}"
                )
        return windows_of(
            ranges,
            scaling=self.known,
            context=self.context,
            horizon=self.horizon,
            time_features=self.known["time_features"],
            has_future=not is_input,
            alone=self.alone,
            fills=self.args.missing_values == "fill",
        )

    def training_rows(self) -> Windows | ChangedWindows | None:
        rows, args = super().training_rows(), self.args
        if rows is None or not (args.jitter or args.window_slice):
            return rows
        return ChangedWindows(rows, jitter=args.jitter, cut=args.window_slice, seed=self.seed)

    def collator(self):
        return lambda batch: batch  # Windows gives whole batches

    def batch_rows(self, rows: Windows, *, is_training: bool = False) -> Windows:
        return rows

    @staticmethod
    def num_items(batch: Mapping[str, torch.Tensor]) -> int | torch.Tensor:
        mask = batch.get("future_observed_mask")
        return batch["future_values"].numel() if mask is None else mask.sum()

    def num_units(self, batch: Mapping[str, torch.Tensor]) -> int:
        return len(batch["past_values"])

    # ------------------------------------------------------------------------------------------------ results

    def predict(self, model, batch: dict[str, torch.Tensor]) -> list[Prediction]:
        """`forecast` (H, C) and, if the model has them, `quantiles` (H, C, Q); standardised, in float32."""
        outputs = model(**{name: value for name, value in batch.items() if name not in FUTURE})
        found = {"forecast": outputs["prediction"].float().cpu().numpy()}
        if self.levels:
            found["quantiles"] = self._quantiles(outputs)
        if "future_values" in batch:
            truth, mask = batch["future_values"], batch.get("future_observed_mask")
            mask = torch.ones_like(truth) if mask is None else mask
            losses = model.forecast.losses(outputs, truth.float()).where(mask > 0, 0)
            found |= {"loss": losses.sum((1, 2)).tolist(), "items": mask.sum((1, 2)).int().tolist()}
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    def _quantiles(self, outputs) -> np.ndarray:
        if outputs.get("quantiles") is not None:
            return outputs["quantiles"].float().cpu().numpy()
        df, mean, scale = (outputs[name].double().cpu().numpy() for name in ("df", "prediction", "scale"))
        quantiles = [mean + scale * stdtrit(df, level) for level in self.levels]
        return np.stack(quantiles, axis=-1).astype(np.float32)

    def _together(self, predictions: Sequence[Prediction], rows: Windows, name: str) -> np.ndarray:
        return rows.by_window(np.stack([prediction[name] for prediction in predictions]))

    def _naive(self, rows: Windows) -> dict[str, np.ndarray]:
        """Forecasts that need no model: the last value, and the last season, over and over."""
        season = self.known["season"]
        seasonal = {"seasonal_naive": rows.repeated(season)} if 1 < season <= rows.context else {}
        return {"naive": rows.repeated(1), **seasonal}

    def score(self, predictions: Sequence[Prediction], rows: Windows) -> dict[str, float]:
        """MSE and MAE of standardised values and in the data's own units, MASE; of naive forecasts, too."""
        truth = rows.truth()
        metrics = {
            "loss": mean_loss(predictions),
            **scores(self._together(predictions, rows, "forecast"), truth, self.known),
        }
        if self.levels:
            quantiles = self._together(predictions, rows, "quantiles")
            metrics |= quantile_scores(quantiles, self.levels, truth, self.known)
        for name, forecast in self._naive(rows).items():
            naive = scores(forecast, truth, self.known)
            metrics |= {f"{name}_mse": naive["mse"], f"{name}_mae": naive["mae"]}
        return metrics

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """Standardised; `lines` has the units and the time stamps."""
        return {"prediction": prediction["forecast"].tolist()}

    def lines(self, prediction: Prediction, index: int, rows: Windows, table: Dataset) -> list[dict[str, object]]:
        """One for each future step and column of a window, in the units of the data."""
        window, only = divmod(index, len(self.columns)) if self.alone else (index, None)
        series, args = self.asked[window], self.args
        if series.times is None:
            marks = [{"step": step} for step in range(1, self.horizon + 1)]
        else:
            marks = [{args.time_column: str(time)} for time in times_after(series.times, self.horizon)]
        name = {args.id_column: series.name} if args.id_column else {}
        lines = []
        for place, column in enumerate([only] if self.alone else range(len(self.columns))):
            values = {"prediction": prediction["forecast"][:, place]}
            for at, level in enumerate(self.levels):
                values[f"q{level:g}"] = prediction["quantiles"][:, place, at]
            for step, mark in enumerate(marks):
                said = {key: self._in_units(value[step], column) for key, value in values.items()}
                lines.append({**name, **mark, "column": self.columns[column], **said})
        return lines

    def _in_units(self, value: float, column: int) -> float:
        return float(f"{value * self.known['std'][column] + self.known['mean'][column]:.6g}")

    def samples(self, predictions: Sequence[Prediction], rows: Windows, count: int = 4) -> list[dict[str, str]]:
        """The first steps of some windows, of the last column."""
        forecast, truth = self._together(predictions, rows, "forecast"), rows.truth()

        def words(values: np.ndarray) -> str:
            return " ".join("-" if np.isnan(v) else f"{self._in_units(v, -1):.4g}" for v in values[:SHOWN])

        samples = []
        for window in np.linspace(0, len(truth) - 1, min(count, len(truth))).astype(int):
            before = rows.filled[rows.starts[window] - SHOWN : rows.starts[window], -1]
            said = f" {words(forecast[window, :, -1])} (truth: {words(truth[window, :, -1])})"
            samples.append({"prompt": f"{self.columns[-1]} {words(before)}", "text": said})
        return samples

    def figures(self, predictions: Sequence[Prediction], rows: Windows) -> list[dict[str, str]]:
        forecast = self._together(predictions, rows, "forecast")
        quantiles = self._together(predictions, rows, "quantiles") if self.levels else None
        words = {"naive": "last value repeated", "seasonal_naive": "last season repeated"}
        others = {words[name]: naive for name, naive in self._naive(rows).items()}
        return [
            forecasts.picture_of_windows(forecast, quantiles, rows, self.columns, self.known, self.levels),
            forecasts.picture_of_steps({"model": forecast, **others}, rows.truth()),
        ]

    def table(self, predictions: Sequence[Prediction], rows: Windows) -> str:
        forecast = self._together(predictions, rows, "forecast")
        return forecasts.table_of_columns(column_errors(forecast, rows.truth(), self.known), self.columns)

    # ------------------------------------------------------------------------------------------------ in words

    def facts(self) -> dict[str, object]:
        return {**super().facts(), "series": self.known}

    def sizes(self) -> dict[str, dict[str, int]]:
        return {split: {"windows": len(rows.starts), "rows": len(rows)} for split, rows in self.rows.items()}

    def next_command(self, directory: Path) -> str:
        source = self.args.dataset or (self.args.test_file or self.args.train_file)[0]
        return f"accelerate launch recipes/predict.py --model {directory} --input {source} --output forecast.csv"


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)
