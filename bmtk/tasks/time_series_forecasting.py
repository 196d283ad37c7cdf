"""Time-series forecasting: from T steps of some columns of a table, the next H.  C columns.

Values are standardised by the training rows; the mean and deviation of each column travel in the model's configuration
(`config.series`), so that predictions are in the units of the data.
"""

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import stdtrit
from transformers import AutoModelForTimeSeriesPrediction, PreTrainedConfig

from bmtk.data.labels import some
from bmtk.data.series import CALENDAR, constant_columns, numeric_columns, scaling_of, times_after, usual_season
from bmtk.data.tables import one_table
from bmtk.data.windows import ChangedWindows, Windows, windows_of
from bmtk.errors import UserError
from bmtk.metrics.forecasts import column_errors, quantile_scores, scores
from bmtk.settings import fact, setting

from . import forecasts
from .objective import Objective
from .scorer import Scorer, mean_loss
from .series_tables import NO_TIMES, Range, SeriesData, SeriesTableArguments, SeriesTables
from .task import Prediction, Task

SHOWN = 8  # steps of a sample
FUTURE = ("future_values", "future_observed_mask")


@dataclass
class TimeSeriesForecastingArguments(SeriesTableArguments):
    """Also what is read of the time stamps, and how training windows are augmented."""

    _argument_group_name = "data of time_series_forecasting"

    time_features: list[str] | None = fact(
        None, f"cycles in which the model reads each time stamp: {', '.join(CALENDAR)}; default: none"
    )
    season: int | None = fact(None, "steps of a season, for naive forecasts and MASE; default: a day, week or year")
    jitter: float = setting(
        0.0, "noise on the context of training windows, in standard deviations of the column (of the training rows)"
    )
    window_slice: float = setting(
        0.0, "training windows cover less time by a share of up to this, stretched over all their steps (0.1: 10 %)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.jitter < math.inf:
            raise UserError(f"jitter={self.jitter} is out of range; give a number of at least 0 (0.1)")
        if not 0 <= self.window_slice < 1:
            raise UserError(
                f"window_slice={self.window_slice} is out of range; give a share of at least 0 and below 1"
            )
        if unknown := set(self.time_features or ()) - CALENDAR.keys():
            raise UserError(
                f"time_features has {', '.join(sorted(unknown))}, which is unknown; choose among {', '.join(CALENDAR)}"
            )
        if self.time_features and self.time_column == NO_TIMES:
            raise UserError("time_features are read from time stamps, and time_column is none; leave one of them out")
        if self.season is not None and self.season < 1:
            raise UserError(f"season={self.season} must be at least 1 step")

    def settings_that_change(self, metric: str) -> dict[str, str]:
        """Architecture fields are among them.  Windows of one table look back into the part before their own."""
        found = {
            **super().settings_that_change(metric),
            "id_column": "decides which values are measured",
            "prediction_length": "decides how far ahead is forecast, and the farther, the harder",
        }
        if metric == "mase":
            found["season"] = "decides which naive forecast the errors are divided by"
        if metric == "loss":
            found["series_loss"] = "decides what the loss is"
        if self.validation_file or (self.dataset and not one_table(self.dataset)):
            found["context_length"] = "decides with which row of the validation table the first forecast begins"
        return found


class TimeSeriesForecastingData(SeriesData):
    """Tables of series, for models that forecast each column alone unless num_input_channels says otherwise."""

    @property
    def config_fields(self) -> dict[str, object]:
        features = 2 * len(self.args.time_features or ())
        fields = {"input_type": "series", "num_input_channels": 1, "num_time_features": features}
        return {**fields, "linear_forecast": True}


class TimeSeriesForecastingObjective(Objective):
    """Windows of series.  A model with num_input_channels=1 forecasts each column alone; with C, all together.

    The rows of a window that is forecast column by column are its columns; an item of the loss is an observed value.
    `series` holds the columns, their scale, the season and the time features; with training rows it is learned from
    them, and becomes `config.series`.
    """

    data: TimeSeriesForecastingData

    def __init__(self, data: TimeSeriesForecastingData, config: PreTrainedConfig, *, labels: Sequence[str] = ()):
        """Raises: UserError if the model reads no series, or others than these."""
        super().__init__(data, config, labels=labels)
        kind = getattr(config, "input_type", None)
        if kind != "series":
            raise UserError(f"a {config.model_type} of input_type={kind!r} forecasts no series; it needs 'series'")
        of_model = series_of_model(data.model, config)
        is_trained = "train" in data.rows
        if not is_trained and not of_model:
            raise UserError(
                f"the configuration of {data.model} has no `series` (columns, mean, std): another task trained it"
            )
        columns: list[str] = self._columns() if is_trained else of_model["columns"]
        self.tables = SeriesTables(data, columns)
        if not is_trained:
            self.tables.known = {name: of_model[name] for name in ("time_format", "utc_offset") if name in of_model}
        self.series = self._learned(of_model.get("time_features")) if is_trained else of_model
        if is_trained:
            config.series = self.series
        self._check_inputs()

    def _columns(self) -> list[str]:
        """The columns to forecast."""
        table, args = self.data.rows["train"], self.args
        if args.target_columns:
            return list(args.target_columns)
        columns, others = numeric_columns(table, {args.time_column, self.data.id_column or ""})
        if not columns:
            raise UserError(f"no column of the train data holds numbers; its columns are {some(table.column_names)}")
        if others:
            self.notes.append(f"not forecast, as fewer than half of the cells are numbers: {some(others)}")
        return columns

    def _learned(self, time_features: Sequence[str] | None) -> dict[str, Any]:
        """`series` of the training rows; `time_features` are those of a trained model, if the settings name none."""
        args, tables, table = self.args, self.tables, self.data.rows["train"]
        features = args.time_features if args.time_features is not None else time_features
        tables.keep_steps_apart(self.data.rows)
        ranges = tables.ranges(table, "train")
        season = args.season or usual_season(ranges[0][0].times)
        tables.note_unused_rows(table)
        scaling = scaling_of(ranges, season, tables.columns)
        if constant := constant_columns(ranges, tables.columns):
            self.notes.append(f"the same value in all training rows, of which nothing is learned: {some(constant)}")
        return {
            "columns": list(tables.columns),
            "time_features": list(features or ()),
            "season": season,
            **tables.known,
            **scaling,
        }

    def _check_inputs(self) -> None:
        """Raise UserError if the model does not read as many columns and time features as there are."""
        config, columns, features = self.config, self.tables.columns, self.series["time_features"]
        if config.num_input_channels not in (1, len(columns)):
            raise UserError(
                f"num_input_channels={config.num_input_channels} is neither 1 (each column alone) nor "
                f"{len(columns)} (all together: {some(columns)})"
            )
        if config.num_time_features != 2 * len(features):
            raise UserError(
                f"num_time_features={config.num_time_features} does not go with time_features={list(features)}, of "
                f"which each gives a sine and a cosine; leave num_time_features out"
            )
        if features and self.args.time_column == NO_TIMES:
            raise UserError(f"the model reads {', '.join(features)} of time stamps, and time_column is none")

    # ------------------------------------------------------------------------------------------------ rows

    def encode(self, rows: Dataset, where: str) -> Windows:
        """Every window of a split; of rows to be predicted (`where` is "input"), the one that begins at their end."""
        ranges, has_future = self.tables.ranges(rows, where), where != "input"
        for one in ranges:
            self._check_length(one, where, has_future=has_future)
        return windows_of(
            ranges,
            scaling=self.series,
            context=self.config.context_length,
            horizon=self.config.prediction_length,
            time_features=self.series["time_features"],
            has_future=has_future,
            alone=self.config.num_input_channels == 1,
            fills=self.args.missing_values == "fill",
        )

    def _check_length(self, steps: Range, where: str, *, has_future: bool) -> None:
        """Raise UserError if no window ends within `steps`."""
        series, first, last = steps
        context, horizon = self.config.context_length, self.config.prediction_length
        needed = horizon if has_future else 0
        if last >= context + needed and last - first >= needed:
            return
        name = f"series {series.name!r} of the {where} rows" if series.name else f"the {where} rows"
        future = (
            f" and prediction_length={horizon} to compare with: lower these, or give this part more rows (split_rows)"
            if has_future
            else ""
        )
        before = f" (after {first:,} others)" if first else ""
        raise UserError(
            f"{name}: {last - first:,} rows{before} are too few for one window; it needs context_length="
            f"{context}{future}"
        )

    def training_rows(self) -> Windows | ChangedWindows | None:
        rows: Windows | None = super().training_rows()
        args = self.args
        if rows is None or not (args.jitter or args.window_slice):
            return rows
        return ChangedWindows(rows, jitter=args.jitter, cut=args.window_slice, seed=self.data.seed)

    def collator(self) -> Callable[[Any], dict[str, Any]]:
        return lambda batch: batch  # Windows gives whole batches

    def batch_rows(self, rows: Windows, *, is_training: bool = False) -> Windows:
        return rows

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> int | torch.Tensor:
        mask = batch.get("future_observed_mask")
        return batch["future_values"].numel() if mask is None else mask.sum()

    def num_units(self, batch: Mapping[str, torch.Tensor]) -> int:
        return len(batch["past_values"])

    # ------------------------------------------------------------------------------------------------ in words

    def data_record(self) -> dict[str, object]:
        return {**super().data_record(), "series": self.series}

    def sizes(self) -> dict[str, dict[str, float]]:
        return {split: {"windows": len(rows.starts), "rows": len(rows)} for split, rows in self.rows.items()}

    def next_command(self, directory: Path) -> str:
        source = self.args.dataset or (self.args.test_file or self.args.train_file)[0]
        return (
            shlex.join(["accelerate", "launch", "recipes/predict.py", "--model", str(directory), "--input", source])
            + " --output forecast.csv"
        )


def series_of_model(model: str | None, config: PreTrainedConfig) -> dict[str, Any]:
    """`series` of a trained model; an adapter's is in its run.json, as its configuration is that of its base."""
    if model and (Path(model) / "adapter_config.json").is_file():
        run = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))
        of_adapter: dict[str, Any] = run["data"]["series"]
        return of_adapter
    return getattr(config, "series", None) or {}


class TimeSeriesForecastingScorer(Scorer):
    """Errors of forecasts and of quantiles, beside those of naive forecasts."""

    objective: TimeSeriesForecastingObjective

    def __init__(self, objective: TimeSeriesForecastingObjective):
        super().__init__(objective)
        config = objective.config
        self.series, self.columns = objective.series, objective.tables.columns
        self.levels = list(config.quantiles) if config.series_loss in ("quantile", "student_t") else []
        # MASE where a column has one; quantiles where the model has them.  Naive forecasts are no model's.
        mase = ["mase"] if any(error > 0 for error in self.series["seasonal_error"]) else []
        quantiles = ["quantile_loss", "weighted_quantile_loss", "coverage"] if self.levels else []
        self.metrics = ["loss", "mse", "mae", "original_mse", "original_mae", *mase, *quantiles]

    # ------------------------------------------------------------------------------------------------ predictions

    def predict(self, model: Any, batch: Mapping[str, torch.Tensor]) -> list[Prediction]:
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

    def _quantiles(self, outputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        if outputs.get("quantiles") is not None:
            return outputs["quantiles"].float().cpu().numpy()
        df, mean, scale = (outputs[name].double().cpu().numpy() for name in ("df", "prediction", "scale"))
        quantiles = [mean + scale * stdtrit(df, level) for level in self.levels]
        return np.stack(quantiles, axis=-1).astype(np.float32)

    def by_window(self, predictions: Sequence[Prediction], rows: Windows, name: str) -> np.ndarray:
        """`forecast` (W, H, C) or `quantiles` (W, H, C, Q) of all windows."""
        return rows.by_window(np.stack([prediction[name] for prediction in predictions]))

    def score(self, predictions: Sequence[Prediction], rows: Windows) -> dict[str, float]:
        """MSE and MAE of standardised values and in the data's own units, MASE; MSE and MAE of naive forecasts."""
        truth = rows.truth()
        forecast = self.by_window(predictions, rows, "forecast")
        metrics = {"loss": mean_loss(predictions), **scores(forecast, truth, self.series)}
        if self.levels:
            quantiles = self.by_window(predictions, rows, "quantiles")
            metrics |= quantile_scores(quantiles, self.levels, truth, self.series)
        for name, naive in forecasts.naive_forecasts(rows, self.series["season"]).items():
            errors = scores(naive, truth, self.series)
            metrics |= {f"{name}_mse": errors["mse"], f"{name}_mae": errors["mae"]}
        return metrics

    # ------------------------------------------------------------------------------------------------ in words

    def describe(self, prediction: Prediction) -> dict[str, object]:
        """Standardised; `lines` has the units and the time stamps."""
        return {"prediction": prediction["forecast"].tolist()}

    def lines(self, prediction: Prediction, index: int, rows: Windows, table: Dataset) -> list[dict[str, object]]:
        """One for each future step and column of a window, in the units of the data."""
        window, first = divmod(index, len(self.columns)) if rows.alone else (index, 0)
        steps, lines = self._future_steps(table, window), []
        for channel in range(prediction["forecast"].shape[1]):
            column = first + channel
            values = {"prediction": prediction["forecast"][:, channel]}
            for position, level in enumerate(self.levels):
                values[f"q{level:g}"] = prediction["quantiles"][:, channel, position]
            for step, names in enumerate(steps):
                predicted = {key: self._in_units(value[step], column) for key, value in values.items()}
                lines.append({**names, "column": self.columns[column], **predicted})
        return lines

    def _future_steps(self, table: Dataset, window: int) -> list[dict[str, object]]:
        """What names each forecast step of a series: the series, and its time stamp or number."""
        args, horizon = self.objective.args, self.objective.config.prediction_length
        series = self.objective.tables.series(table, "input")[window]
        id_column = self.objective.data.id_column
        name = {id_column: series.name} if id_column else {}
        if series.times is None:
            return [{**name, "step": step} for step in range(1, horizon + 1)]
        written = series.time_format.written if series.time_format else str
        return [{**name, args.time_column: written(time)} for time in times_after(series.times, horizon)]

    def _in_units(self, value: float, column: int) -> float:
        return float(f"{value * self.series['std'][column] + self.series['mean'][column]:.6g}")

    def samples(self, predictions: Sequence[Prediction], rows: Windows, count: int = 4) -> list[dict[str, str]]:
        """The first steps of some windows, of the last column."""
        forecast, truth = self.by_window(predictions, rows, "forecast"), rows.truth()

        def words(values: np.ndarray) -> str:
            return " ".join("-" if np.isnan(v) else f"{self._in_units(v, -1):.4g}" for v in values[:SHOWN])

        samples = []
        for window in np.linspace(0, len(truth) - 1, min(count, len(truth))).astype(int):
            before = rows.filled[rows.starts[window] - SHOWN : rows.starts[window], -1]
            text = f" {words(forecast[window, :, -1])} (truth: {words(truth[window, :, -1])})"
            samples.append({"prompt": f"{self.columns[-1]} {words(before)}", "text": text})
        return samples

    def figures(self, predictions: Sequence[Prediction], rows: Windows) -> list[dict[str, str]]:
        forecast = self.by_window(predictions, rows, "forecast")
        quantiles = self.by_window(predictions, rows, "quantiles") if self.levels else None
        titles = {"naive": "last value repeated", "seasonal_naive": "last season repeated"}
        naive = forecasts.naive_forecasts(rows, self.series["season"])
        return [
            forecasts.figure_of_windows(forecast, quantiles, rows, self.columns, self.series, self.levels),
            forecasts.figure_of_steps(
                {"model": forecast, **{titles[name]: values for name, values in naive.items()}}, rows.truth()
            ),
        ]

    def table(self, predictions: Sequence[Prediction], rows: Windows) -> str:
        forecast = self.by_window(predictions, rows, "forecast")
        return forecasts.table_of_columns(column_errors(forecast, rows.truth(), self.series), self.columns)


TASK = Task(
    name="time_series_forecasting",
    auto_class=AutoModelForTimeSeriesPrediction,
    about={
        "pipeline_tag": "time-series-forecasting",
        "auto_class": "AutoModelForTimeSeriesPrediction",
        "processor_class": None,
        "noun": "forecaster of time series",
        "loss_unit": "",
        "limits": "It continues what it has seen: a change in how the series come about, or in how they are measured, "
        "makes its forecasts wrong without a sign.",
    },
    arguments=TimeSeriesForecastingArguments,
    data=TimeSeriesForecastingData,
    objective=TimeSeriesForecastingObjective,
    scorer=TimeSeriesForecastingScorer,
    main_metric="mse",
    unit="windows",
)
