"""Time-series forecasting: tables, splits, windows and what is refused; metrics against sums written out by hand."""

import csv
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy.stats import t as student_t
from transformers import AutoModelForTimeSeriesPrediction

import bmtk  # noqa: F401  (registers the families)
from bmtk.data.series import bounds, calendar_features, times_after, usual_season
from bmtk.data.tables import read_table
from bmtk.metrics.forecasts import column_errors, quantile_scores
from bmtk.models.configuration_bm_transformer import BmTransformerConfig
from bmtk.tasks import forecasts
from bmtk.tasks.time_series_forecasting import TASK, TimeSeriesForecastingArguments
from recipes import evaluate, finetune, predict, pretrain

ROOT = Path(__file__).parents[2]
WAVES = ROOT / "recipes" / "data" / "waves"
TINY = {"context_length": 8, "prediction_length": 4, "patch_size": 4, "hidden_size": 8, "num_attention_heads": 2}
SMOKE = ["--task", "time_series_forecasting", "--preset", "smoke", "--disable_tqdm", "true"]


def numbers(count=60, columns=2):
    draw = np.random.default_rng(0)
    return np.round(draw.normal(size=(count, columns)) * [1, 10, 3][:columns] + [5, -20, 0][:columns], 3)


def write(path, values, *, start="2024-01-01", step="1h", names=("a", "b", "c"), times=None, more=None):
    """A CSV file of (rows, C) cells with time stamps; `more` columns go before them."""
    times = pd.date_range(start, periods=len(values), freq=step) if times is None else times
    more = more or {}
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["date", *more, *names[: len(values[0])]])
        for row, time in enumerate(times):
            lines.writerow([time, *(cells[row] for cells in more.values()), *values[row]])
    return str(path)


def read(path, **settings):
    splits = settings.pop("splits", ("train", "validation", "test"))
    settings = {"dataset": path, "split_rows": [30, 15, 15], **settings}
    return TASK.read(TimeSeriesForecastingArguments(**settings), splits=splits)


def bind(data, **fields):
    """The objective of a new model with this data."""
    return data.bind(data.new_config("bm_transformer", {**TINY, **fields}))


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForTimeSeriesPrediction.from_config(config).eval()


def predictions_of(objective, model, split="test", batch_size=64):
    with torch.no_grad():
        batches = objective.batches_in_order(objective.rows[split], batch_size=batch_size)
        return [p for batch in batches for p in objective.scorer.predict(model, batch)]


# ---------------------------------------------------------------------------------------------------- rows


def test_a_series_in_several_files_is_that_of_one(tmp_path):
    values, times = numbers(), pd.date_range("2024-01-01", periods=60, freq="1h")
    one = bind(read(write(tmp_path / "x.csv", values)))
    for number, rows in enumerate(np.array_split(np.arange(60), 3)):
        write(tmp_path / f"part-{number:02}.csv", values[rows], times=times[rows])
    named = {"dataset": None, "train_file": [str(tmp_path / "part-0[01].csv"), str(tmp_path / "part-02.csv")]}
    for given in ({"path": str(tmp_path / "part-{00..02}.csv")}, {"path": None, **named}):
        several = bind(read(**given))
        for split in ("train", "validation", "test"):
            pairs = zip(several.rows[split], one.rows[split], strict=True)
            assert all(np.array_equal(ours[name], theirs[name]) for ours, theirs in pairs for name in theirs)


def test_windows_of_one_table_look_back_over_the_split_and_never_ahead(tmp_path):
    values = numbers()
    objective = bind(read(write(tmp_path / "x.csv", values)))
    mean, std = values[:30].mean(0), values[:30].std(0)
    assert objective.config.series["columns"] == ["a", "b"]
    assert objective.config.series["mean"] == pytest.approx(mean.tolist())
    assert objective.config.series["std"] == pytest.approx(std.tolist())
    # forecasts of 4 steps: of rows 8 to 29 after 8 of context; of rows 30 to 44 and 45 to 59, whose context is there
    expected = {"train": (8, 30 - 4), "validation": (30, 45 - 4), "test": (45, 60 - 4)}
    for split, (first, last) in expected.items():
        assert objective.rows[split].starts.tolist() == list(range(first, last + 1)), split
        assert len(objective.rows[split]) == 2 * (last + 1 - first)
    row = objective.rows["test"][2 * 3 + 1]  # the fourth window, column b
    assert row["past_values"][:, 0].tolist() == pytest.approx(
        ((values[40:48, 1] - mean[1]) / std[1]).tolist(), abs=1e-5
    )
    assert row["future_values"][:, 0].tolist() == pytest.approx(
        ((values[48:52, 1] - mean[1]) / std[1]).tolist(), abs=1e-5
    )
    assert objective.sizes()["train"] == {"windows": 19, "rows": 38}


@pytest.mark.parametrize("family", ["bm_cnn", "bm_rnn", "bm_transformer"])
def test_a_new_model_adds_a_linear_forecast_unless_it_is_switched_off(tmp_path, family):
    data = read(write(tmp_path / "x.csv", numbers()))
    assert data.new_config(family, {}).linear_forecast
    assert not data.new_config(family, {"linear_forecast": False}).linear_forecast


def test_columns_together_or_alone_are_the_same_numbers(tmp_path):
    path = write(tmp_path / "x.csv", numbers())
    alone, together = bind(read(path)), bind(read(path), num_input_channels=2)
    one, all_of = alone.rows["train"].batch([4, 5, 8]), together.rows["train"].batch([2, 4])
    assert all_of["past_values"].shape == (2, 8, 2)
    assert torch.equal(
        one["past_values"][..., 0], torch.stack([all_of["past_values"][i, :, c] for i, c in ((0, 0), (0, 1), (1, 0))])
    )
    forecast = np.arange(2 * 12 * 4).reshape(24, 4, 1)
    assert alone.rows["test"].by_window(forecast)[3, :, 1].tolist() == forecast[7, :, 0].tolist()
    with pytest.raises(
        ValueError, match=r"num_input_channels=3 is neither 1 \(each column alone\) nor 2 \(all together"
    ):
        bind(read(path), num_input_channels=3)


def test_splits_are_rows_or_shares_and_the_usual_one_is_noted(tmp_path):
    assert bounds(100, [0.7, 0.1, 0.2]) == [(0, 70), (70, 80), (80, 100)]
    assert bounds(100, [8, 4, 4]) == [(0, 8), (8, 12), (12, 16)]
    path = write(tmp_path / "x.csv", numbers(100))
    data = read(path, split_rows=None)
    assert data.notes == ["one table: 70%, 10%, 20% of it train, validate and test, in order of time"]
    assert bind(data).rows["test"].starts.tolist() == list(range(80, 97))
    data = read(None, train_file=[path], split_rows=[0.5, 0.5])
    assert list(data.rows) == ["train", "validation"]
    objective = bind(read(path, split_rows=[50, 20, 20]))
    assert objective.notes == ["split_rows leaves 10 rows at the end unused"]
    with pytest.raises(ValueError, match=r"split_rows=\[90, 8, 8\] ends with row 106; the table has 100 rows"):
        bind(read(path, split_rows=[90, 8, 8]))
    for wrong in ([1], [0.9, 0.2], [0, 5], [-1, 2]):
        with pytest.raises(ValueError, match="must be two or three numbers for training, validation and test"):
            read(path, split_rows=wrong)


def test_files_of_their_own_have_windows_of_their_own(tmp_path):
    values = numbers()
    files = {
        "train_file": [write(tmp_path / "train.csv", values[:30])],
        "test_file": [write(tmp_path / "test.csv", values[30:], start="2024-02-01")],
    }
    data = read(None, **files, validation_fraction=0.3)
    assert data.notes == ["there are no validation rows: the last 30% of the training rows are held out"]
    objective = bind(data)
    assert objective.config.series["mean"] == pytest.approx(values[:21].mean(0).tolist())
    assert objective.rows["validation"].starts.tolist() == list(range(21, 27))
    assert objective.rows["test"].starts.tolist() == list(range(8, 27))


def test_steps_that_are_measured_on_are_not_trained_on(tmp_path):
    values = numbers()
    files = {
        "train_file": [write(tmp_path / "train.csv", values[:40])],
        "validation_file": [write(tmp_path / "validation.csv", values[38:], start="2024-01-02 14:00:00")],
    }
    found = r"2 of the validation rows are training rows, too \(the first: 2024-01-02 14:00:00\)"
    with pytest.raises(ValueError, match=found + "; take them out of one of the files, or set leakage=allow"):
        bind(read(None, **files))
    objective = bind(read(None, **files, leakage="allow"))
    assert objective.notes[-1].endswith("the results on these are not honest")


def test_series_of_several_names_are_windowed_one_by_one(tmp_path):
    values = numbers(60)
    names = ["y", "x"] * 30
    times = pd.date_range("2024-01-01", periods=30, freq="1h").repeat(2)
    path = write(tmp_path / "x.csv", values, times=times, more={"meter": names})
    objective = bind(read(path, id_column="meter", split_rows=[0.5, 0.5]))
    assert objective.scorer.columns == ["a", "b"]
    train = np.concatenate([values[0::2][:15], values[1::2][:15]])
    assert objective.config.series["mean"] == pytest.approx(train.mean(0).tolist())
    assert objective.rows["train"].starts.tolist() == [*range(8, 12), *range(38, 42)]
    assert objective.rows["train"].truth()[4, 0] == pytest.approx(
        (values[1::2][8] - train.mean(0)) / train.std(0), abs=1e-5
    )


def test_parquet_dates_and_rows_out_of_order(tmp_path):
    values, order = numbers(), np.random.default_rng(1).permutation(60)
    times = pd.date_range("2024-01-01", periods=60, freq="1D")
    columns = {"date": times[order].to_pydatetime().tolist(), "a": values[order, 0], "note": ["x"] * 60}
    Dataset.from_dict(columns).to_parquet(tmp_path / "x.parquet")
    objective = bind(read(str(tmp_path / "x.parquet")))
    assert objective.config.series["mean"] == pytest.approx([values[:30, 0].mean()])
    assert objective.config.series["season"] == 7
    assert objective.notes == ["not forecast, as fewer than half of the cells are numbers: 'note'"]


# ---------------------------------------------------------------------------------------------------- time


def test_steps_and_seasons_follow_the_calendar():
    def after(start, step, count=12):
        return [str(t) for t in times_after(pd.date_range(start, periods=count, freq=step), 2)]

    assert after("2024-01-01", "1h") == ["2024-01-01 12:00:00", "2024-01-01 13:00:00"]
    assert after("2024-01-01", "MS") == ["2025-01-01 00:00:00", "2025-02-01 00:00:00"]
    assert after("2024-01-31", "ME", 13) == ["2025-02-28 00:00:00", "2025-03-31 00:00:00"]
    irregular = pd.DatetimeIndex(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-05"])
    assert [str(t) for t in times_after(irregular, 1)] == ["2024-01-06 00:00:00"]
    seasons = {"15min": 96, "1h": 24, "1D": 7, "MS": 12, "W": 1}
    assert {s: usual_season(pd.date_range("2024-01-01", periods=30, freq=s)) for s in seasons} == seasons
    assert usual_season(None) == 1


def test_calendar_features_are_sine_and_cosine_of_the_cycle(tmp_path):
    times = pd.DatetimeIndex(["2024-01-01 06:30:00", "2024-07-03 18:00:00"])  # a Monday and a Wednesday
    features = calendar_features(times, ["hour", "weekday", "month"])
    for row, places in enumerate([(6.5 / 24, 0, 0), (18 / 24, 2 / 7, 6 / 12)]):
        expected = [f(2 * math.pi * place) for place in places for f in (math.sin, math.cos)]
        assert features[row].tolist() == pytest.approx(expected, abs=1e-6)
    objective = bind(read(write(tmp_path / "x.csv", numbers()), time_features=["hour"]))
    assert objective.config.num_time_features == 2
    batch = objective.rows["train"].batch([0])
    hours = [math.sin(2 * math.pi * hour / 24) for hour in range(12)]
    assert batch["past_time_features"][0, :, 0].tolist() == pytest.approx(hours[:8], abs=1e-6)
    assert batch["future_time_features"][0, :, 0].tolist() == pytest.approx(hours[8:], abs=1e-6)
    assert len(predictions_of(objective, model_of(objective.config))) == len(objective.rows["test"])
    with pytest.raises(ValueError, match="num_time_features=3 does not go with time_features="):
        bind(read(write(tmp_path / "x.csv", numbers())), num_time_features=3)
    with pytest.raises(ValueError, match="time_features has year, which is unknown; choose among minute, hour"):
        read("x.csv", time_features=["year"])


def test_odd_time_stamps_are_noted(tmp_path):
    times = list(pd.date_range("2024-01-01", periods=60, freq="1h"))
    times[10] = times[9]
    objective = bind(read(write(tmp_path / "x.csv", numbers(), times=times)))
    assert objective.notes == [
        "rows: 1 time stamps are repeated (first: 2024-01-01 09:00:00)",
        "rows: 1 of 59 steps are not 0 days 01:00:00 long (first: after 2024-01-01 09:00:00); windows count rows, "
        "not time",
    ]
    times[20] = "yesterday"
    with pytest.raises(ValueError, match=r"rows: date of row 21 holds 'yesterday', no time stamp .* \(1 of 60 rows"):
        bind(read(write(tmp_path / "x.csv", numbers(), times=times)))
    data = read(write(tmp_path / "x.csv", numbers(), times=times), time_column="none", target_columns=["a"])
    assert bind(data).config.series["season"] == 1


# ---------------------------------------------------------------------------------------------------- gaps


def with_gaps(path):
    values = numbers().tolist()
    values[10][0], values[40][1], values[50][1] = "", "broken", "inf"
    return write(path, values)


def test_what_is_no_number_is_named_and_stops_unless_it_is_filled_or_masked(tmp_path):
    found = r"rows: 3 of 120 values are no numbers \(a of row 11 is missing, b of row 41 holds 'broken', b of row 51"
    with pytest.raises(
        ValueError, match=found + r" holds 'inf'\)\.  missing_values=fill reads the value before a gap"
    ):
        bind(read(with_gaps(tmp_path / "x.csv")))
    with pytest.raises(ValueError, match="missing_values='drop' is unknown; choose one of stop, fill, mask"):
        read("x.csv", missing_values="drop")
    path = write(tmp_path / "x.csv", [[*row, ""] for row in numbers().tolist()])
    with pytest.raises(ValueError, match="rows: c holds no number at all; leave it out of target_columns"):
        bind(read(path, target_columns=["a", "c"], missing_values="mask"))
    late = [[*row, 1.0 if place > 40 else ""] for place, row in enumerate(numbers().tolist())]
    with pytest.raises(ValueError, match="no training row has a number in c; leave it out of target_columns"):
        bind(read(write(tmp_path / "x.csv", late), target_columns=["c"], missing_values="fill"))


@pytest.mark.parametrize("policy", ["mask", "fill"])
def test_gaps_are_never_a_target_and_are_masked_or_filled_as_context(tmp_path, policy):
    objective = bind(read(with_gaps(tmp_path / "x.csv"), missing_values=policy), num_input_channels=2)
    assert len(objective.notes) == 1
    rows = objective.rows["train"]
    batch = rows.batch(range(len(rows)))
    start = rows.starts.tolist()
    as_future, as_past = batch["future_observed_mask"], batch["past_observed_mask"]
    assert as_future[start.index(9), :, 0].tolist() == [1, 0, 1, 1]
    assert as_future[:, :, 1].all()
    place = start.index(12)  # context: rows 4 to 11
    assert as_past[place, :, 0].tolist() == [1, 1, 1, 1, 1, 1, float(policy == "fill"), 1]
    filled = batch["past_values"][place, 5, 0] if policy == "fill" else 0
    assert batch["past_values"][place, 6, 0] == filled
    assert int(objective.num_items(batch)) == int(as_future.sum()) == len(rows) * 8 - 3
    metrics = objective.scorer.score(predictions_of(objective, model_of(objective.config)), objective.rows["test"])
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_missing_value_counts_nowhere(tmp_path):
    """MSE over what is observed, in Python floats."""
    objective = bind(read(with_gaps(tmp_path / "x.csv"), missing_values="mask"))
    predictions = predictions_of(objective, model_of(objective.config))
    rows, total, count = objective.rows["test"], 0.0, 0
    for row, prediction in enumerate(predictions):
        window, column = divmod(row, 2)
        for step in range(4):
            truth = float(rows.values[rows.starts[window] + step, column])
            if not math.isnan(truth):
                total, count = total + (float(prediction["forecast"][step, 0]) - truth) ** 2, count + 1
    metrics = objective.scorer.score(predictions, rows)
    assert count < len(predictions) * 4
    assert metrics["mse"] == pytest.approx(total / count, rel=1e-9)
    assert metrics["loss"] == pytest.approx(metrics["mse"], rel=1e-5)  # series_loss is mse


@pytest.mark.parametrize("alone", [True, False])
def test_sliced_windows_are_the_series_at_another_pace(tmp_path, alone):
    values = numbers()
    values[:, 0] = np.arange(len(values))  # a clock
    data = read(write(tmp_path / "x.csv", values), window_slice=0.4, time_features=["hour"])
    objective = bind(data, num_input_channels=1 if alone else 2)
    plain, changed = objective.rows["train"], objective.training_rows()
    assert len(changed) == len(plain)
    mean, std = (np.array(objective.series[name]) for name in ("mean", "std"))
    paces = set()
    for window, start in enumerate(plain.starts):
        index = 2 * window if alone else window
        batch = changed.batch([index], [3])
        clock = torch.cat((batch["past_values"], batch["future_values"]), 1)[0, :, 0].numpy() * std[0] + mean[0]
        assert clock[7] == pytest.approx(start - 1, abs=1e-3)  # the last step that is seen
        pace = np.diff(clock)
        assert np.allclose(pace, pace[0], atol=1e-3)
        assert 0.6 - 1e-3 <= pace[0] <= 1
        paces.add(round(float(pace[0]), 2))
        hours = changed.batch([index], [3])["future_time_features"][0, :, 0].numpy()
        assert np.allclose(hours, np.interp(clock[8:], np.arange(60), plain.features[:, 0]), atol=1e-3)
        if not alone:
            noise = torch.cat((batch["past_values"], batch["future_values"]), 1)[0, :, 1].numpy() * std[1] + mean[1]
            assert np.allclose(noise, np.interp(clock, np.arange(60), values[:, 1]), atol=0.02)
    assert len(paces) > 10


def test_jitter_changes_what_is_seen_of_the_past_and_nothing_else(tmp_path):
    values = numbers()
    values[5, 0] = np.nan
    objective = bind(read(write(tmp_path / "x.csv", values), jitter=0.5, missing_values="mask"), num_input_channels=2)
    rows = range(len(objective.rows["train"]))
    plain, changed = objective.rows["train"].batch(rows), objective.training_rows().batch(rows, [0] * len(rows))
    noise = (changed["past_values"] - plain["past_values"])[plain["past_observed_mask"] > 0]
    assert noise.std() == pytest.approx(0.5, rel=0.15)
    assert abs(noise.mean()) < 0.1
    assert (changed["past_values"][plain["past_observed_mask"] == 0] == 0).all()
    assert all(torch.equal(changed[name], plain[name]) for name in plain if name != "past_values")


def test_augmented_windows_depend_on_epoch_and_row_alone(tmp_path):
    objective = bind(read(write(tmp_path / "x.csv", numbers()), jitter=0.1, window_slice=0.2))
    batches = objective.train_batches(batch_size=len(objective.rows["train"]), micro_batch_size=0, seed=1)
    by_trainer = objective.training_rows()
    for epoch in range(2):
        rows, _ = batches.places(epoch)
        by_trainer.set_epoch(epoch)
        for name, values in batches[epoch][0].items():
            assert torch.equal(values, by_trainer.__getitems__(rows)[name])
    first, second = (by_trainer.batch([0], [epoch])["past_values"] for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, by_trainer.batch([4, 0], [1, 0])["past_values"][1:])
    assert objective.preview_rows() is objective.rows["validation"], "what is measured is not augmented"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_rows": [40, 3, 17]}, "the validation rows: 3 rows .after 40 others. are too few for one window; it "),
        ({"split_rows": [11, 9, 9]}, "needs context_length=8 and prediction_length=4 to compare with"),
        (
            {"target_columns": ["a", "z"]},
            "target_columns='z' is not in the rows data; its columns are date, a, b",
        ),
        ({"time_column": "when"}, "time_column='when' is not in the train data; its columns are date, a, b"),
        ({"id_column": "meter"}, "id_column='meter' is not in the train data; its columns are date, a, b"),
        ({"season": 0}, "season=0 must be at least 1 step"),
        ({"group_column": "a"}, "group_column='a': of series the end is held out; leave it out"),
        ({"jitter": -1.0}, "jitter=-1.0 is out of range; give a number of at least 0"),
        ({"window_slice": 1.0}, "window_slice=1.0 is out of range; give a share of at least 0 and below 1"),
        ({"time_column": "none", "time_features": ["hour"]}, "time_features are read from time stamps"),
    ],
)
def test_bad_settings_are_one_clear_error(tmp_path, settings, message):
    path = write(tmp_path / "x.csv", numbers())
    with pytest.raises(ValueError, match=message):
        bind(read(path, **settings))


def test_models_of_another_kind_are_refused(tmp_path):
    path = write(tmp_path / "x.csv", numbers())
    with pytest.raises(ValueError, match="a bm_transformer of input_type='tokens' forecasts no series"):
        read(path).bind(BmTransformerConfig())
    with pytest.raises(ValueError, match=r"has no `series` \(columns, mean, std\): another task trained it"):
        read(path, splits=["test"]).bind(BmTransformerConfig(input_type="series"))
    words = write(tmp_path / "words.csv", [["x", "y"]] * 60)
    with pytest.raises(
        ValueError, match="no column of the train data holds numbers; its columns are 'date', 'a', 'b'"
    ):
        bind(read(words))
    with pytest.raises(ValueError, match="no data: set dataset"):
        read(None)


# ---------------------------------------------------------------------------------------------------- results


def test_metrics_are_their_formulas(tmp_path):
    """Each value by value, in Python floats: two columns of very different size, and a season of 3 steps."""
    values = numbers()
    objective = bind(read(write(tmp_path / "x.csv", values), season=3))
    predictions = predictions_of(objective, model_of(objective.config))
    metrics, rows = objective.scorer.score(predictions, objective.rows["test"]), objective.rows["test"]
    std, mean = values[:30].std(0), values[:30].mean(0)
    squared, absolute, original, naive, seasonal = [], [[], []], [], [], []
    for row, prediction in enumerate(predictions):
        window, c = divmod(row, 2)
        start = 45 + window
        for step in range(4):
            truth, predicted = values[start + step, c], float(prediction["forecast"][step, 0]) * std[c] + mean[c]
            squared.append(((predicted - truth) / std[c]) ** 2)
            absolute[c].append(abs(predicted - truth))
            original.append((predicted - truth) ** 2)
            naive.append(((values[start - 1, c] - truth) / std[c]) ** 2)
            seasonal.append(((values[start - 3 + step % 3, c] - truth) / std[c]) ** 2)
    scale = [np.mean([abs(values[i, c] - values[i - 3, c]) for i in range(3, 30)]) for c in (0, 1)]
    expected = {
        "loss": np.mean(squared),
        "mse": np.mean(squared),
        "mae": np.mean([np.mean(absolute[c]) / std[c] for c in (0, 1)]),
        "original_mse": np.mean(original),
        "original_mae": np.mean(absolute),
        "mase": np.mean([np.mean(absolute[c]) / scale[c] for c in (0, 1)]),
        "naive_mse": np.mean(naive),
        "seasonal_naive_mse": np.mean(seasonal),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert "naive_mae" in metrics
    errors = column_errors(objective.scorer.by_window(predictions, rows, "forecast"), rows.truth(), objective.series)
    assert errors["mase"] == pytest.approx([np.mean(absolute[c]) / scale[c] for c in (0, 1)], rel=1e-4)
    assert objective.scorer.table(predictions, rows).splitlines()[2].split()[0] == "b"


def test_quantile_scores_are_their_formulas():
    draw = np.random.default_rng(0)
    truth, levels = draw.normal(size=(5, 3, 2)), [0.1, 0.5, 0.9]
    quantiles = np.sort(draw.normal(size=(5, 3, 2, 3)), axis=-1).astype(np.float32)
    truth[2, 1, 0] = np.nan
    scaling = {"mean": [10.0, -5.0], "std": [2.0, 0.5]}
    losses, weighted, total, inside = [], 0.0, 0.0, []
    for place in np.argwhere(~np.isnan(truth)):
        w, h, c = place
        for q, level in enumerate(levels):
            error = truth[w, h, c] - float(quantiles[w, h, c, q])
            losses.append(level * error if error > 0 else (level - 1) * error)
            weighted += 2 * losses[-1] * scaling["std"][c] / 3
        total += abs(truth[w, h, c] * scaling["std"][c] + scaling["mean"][c])
        inside.append(quantiles[w, h, c, 0] <= truth[w, h, c] <= quantiles[w, h, c, 2])
    assert quantile_scores(quantiles, levels, truth, scaling) == pytest.approx(
        {"quantile_loss": np.mean(losses), "weighted_quantile_loss": weighted / total, "coverage": np.mean(inside)}
    )


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_the_weighted_quantile_loss_of_zeros_is_by_their_number(mean):
    scaling, levels = {"mean": [mean], "std": [3.0]}, [0.5]
    truth = np.full((2, 4, 1), -mean / 3.0, dtype=np.float32)  # 0 before it was standardised, and rounded here
    found = quantile_scores(truth[..., None] + np.float32(1), levels, truth, scaling)
    assert found["weighted_quantile_loss"] == pytest.approx(2 * 0.5 * 1 * 3, rel=1e-3)


def test_a_column_of_one_value_is_noted(tmp_path):
    values = [[row[0], 7.0, 7.0 + (place > 40)] for place, row in enumerate(numbers().tolist())]
    objective = bind(read(write(tmp_path / "x.csv", values)))
    assert "the same value in all training rows, of which nothing is learned: 'b', 'c'" in objective.notes


def test_a_part_without_a_row_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the train rows: 0 rows are too few; give this part more rows"):
        bind(read(write(tmp_path / "x.csv", numbers()[:1]), split_rows=[0.4, 0.3, 0.3]))


@torch.no_grad()
def test_a_student_t_gives_its_quantiles(tmp_path):
    objective = bind(read(write(tmp_path / "x.csv", numbers())), series_loss="student_t", quantiles=[0.05, 0.5, 0.8])
    model = model_of(objective.config)
    batch = objective.rows["test"].batch([3])
    outputs = model(past_values=batch["past_values"])
    prediction = objective.scorer.predict(model, batch)[0]
    df, loc, scale = (outputs[name][0, 2, 0].item() for name in ("df", "prediction", "scale"))
    expected = [student_t.ppf(level, df, loc, scale) for level in (0.05, 0.5, 0.8)]
    assert prediction["quantiles"][2, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert prediction["loss"] == pytest.approx(model(**batch, num_items_in_batch=1).loss.item(), rel=1e-5)
    metrics = objective.scorer.score(predictions_of(objective, model), objective.rows["test"])
    assert {"quantile_loss", "coverage"} <= metrics.keys()
    assert {"quantile_loss", "coverage"} <= set(objective.scorer.metrics) <= metrics.keys()


def test_neither_metrics_nor_the_loss_depend_on_the_batch_size(tmp_path):
    objective = bind(read(with_gaps(tmp_path / "x.csv"), missing_values="mask"), series_loss="quantile")
    model, rows = model_of(objective.config), objective.rows["test"]
    whole = objective.scorer.score(predictions_of(objective, model), rows)
    for size in (1, 5):
        again = objective.scorer.score(predictions_of(objective, model, batch_size=size), rows)
        assert again == pytest.approx(whole, rel=1e-5), size
    batch = rows.batch(range(len(rows)))
    count = objective.num_items(batch)
    parts = [rows.batch(part) for part in (range(7), range(7, len(rows)))]
    losses = [model(**part, num_items_in_batch=count).loss.item() for part in parts]
    assert sum(losses) == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert sum(int(objective.num_items(part)) for part in parts) == int(count)


def test_the_best_the_median_and_the_worst_window_are_shown(tmp_path):
    objective = bind(read(write(tmp_path / "x.csv", numbers())), series_loss="quantile")
    truth = np.zeros((5, 2, 1))
    assert forecasts.best_median_worst(truth + np.arange(5)[::-1, None, None], truth) == {
        "best": 4,
        "median": 2,
        "worst": 0,
    }
    rows = objective.rows["test"]
    predictions = predictions_of(objective, model_of(objective.config))
    titles = [figure["title"] for figure in objective.scorer.figures(predictions, rows)]
    assert titles == ["Forecasts and truth: the best, the median and the worst window", "Error by step ahead"]
    sample = objective.scorer.samples(predictions, rows)[0]
    values = numbers()[:, 1]
    assert sample["prompt"] == "b " + " ".join(f"{value:.4g}" for value in values[37:45])
    assert sample["text"].endswith("(truth: " + " ".join(f"{value:.4g}" for value in values[45:49]) + ")")


@pytest.mark.parametrize("alone", [True, False])
def test_a_line_of_a_forecast_names_series_column_and_step(tmp_path, alone):
    """Steps are numbered where there are no time stamps; `lines` are of the table that was encoded."""
    settings = {"id_column": "meter", "time_column": "none"}
    path = write(tmp_path / "x.csv", numbers(120), more={"meter": ["y"] * 60 + ["x"] * 60})
    config = bind(read(path, **settings, target_columns=["a", "b"]), num_input_channels=1 if alone else 2).config
    objective = read(None, **settings, splits=()).bind(config)
    table = read_table([Path(path)])
    rows, scorer, model = objective.encode_inputs(table), objective.scorer, model_of(config)
    with torch.no_grad():
        predictions = scorer.predict(model, rows.batch(range(len(rows))))
    lines = [line for index, one in enumerate(predictions) for line in scorer.lines(one, index, rows, table)]
    assert [(line["meter"], line["column"], line["step"]) for line in lines] == [
        (meter, column, step) for meter in ("y", "x") for column in ("a", "b") for step in (1, 2, 3, 4)
    ]
    forecast = predictions[-1]["forecast"][2, -1]  # of series x, column b
    mean, std = (config.series[name][1] for name in ("mean", "std"))
    assert lines[-2] == {
        "meter": "x",
        "step": 3,
        "column": "b",
        "prediction": pytest.approx(forecast * std + mean, rel=1e-5),
    }


def forecast_lines(objective, table):
    """The lines of forecasts from the end of a table."""
    table = objective.data.readable_rows(table, "input")
    rows, scorer = objective.encode_inputs(table), objective.scorer
    with torch.no_grad():
        predictions = scorer.predict(model_of(objective.config), rows.batch(range(len(rows))))
    return [line for index, one in enumerate(predictions) for line in scorer.lines(one, index, rows, table)]


def test_forecasts_are_written_as_the_input_and_a_short_one_is_read_as_the_training_table(tmp_path):
    times = pd.date_range("2024-01-20", periods=60, freq="D")
    written = [f"{time:%d/%m/%Y}" for time in times]
    path = write(tmp_path / "x.csv", numbers(), times=written)
    trained = bind(read(path))
    assert trained.config.series["time_format"] == "day_first"
    assert any("read day first" in note and "a step is 1 day" in note for note in trained.notes)
    short = write(tmp_path / "short.csv", numbers(9), times=[f"0{day}/03/2024" for day in range(1, 10)])
    later = read(None, splits=(), split_rows=None).bind(trained.config)
    lines = forecast_lines(later, read_table([Path(short)]))
    assert [line["date"] for line in lines[:4]] == ["10/03/2024", "11/03/2024", "12/03/2024", "13/03/2024"]
    data = read(None, splits=(), split_rows=None, time_format="month_first")
    lines = forecast_lines(data.bind(trained.config), read_table([Path(short)]))
    assert lines[0]["date"] == "10/03/2024"  # nine months on, 3 October


def test_stamps_with_an_offset_are_continued_with_it(tmp_path):
    times = [f"{time.isoformat()}+05:30" for time in pd.date_range("2024-01-20", periods=60, freq="h")]
    objective = bind(read(write(tmp_path / "x.csv", numbers(), times=times)))
    assert objective.config.series["utc_offset"] == 330
    lines = forecast_lines(objective, read_table([tmp_path / "x.csv"]))
    assert lines[0]["date"] == "2024-01-22T12:00:00+05:30"


def test_one_row_a_series_is_split_trained_and_forecast_as_one_row_a_step(tmp_path):
    values = numbers(60, 1)[:, 0]
    lines = [{"id": name, "load": (values + shift).tolist()} for name, shift in (("b", 0), ("a", 5))]
    path = tmp_path / "wide.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    data = read(str(path), split_rows=[0.5, 0.25, 0.25], time_column="none")
    objective = bind(data)
    assert data.notes[-1] == "train: one row a series: 2 series of 60 to 60 steps, named by id"
    names = {"id": ["b"] * 60 + ["a"] * 60}
    long = write(tmp_path / "long.csv", [[v] for v in [*values, *(values + 5)]], names=["load"], more=names)
    settings = {"split_rows": [0.5, 0.25, 0.25], "time_column": "none", "id_column": "id", "target_columns": ["load"]}
    other = bind(read(long, **settings))
    assert objective.config.series == other.config.series
    for split in ("train", "validation", "test"):
        assert objective.rows[split].starts.tolist() == other.rows[split].starts.tolist()
    lines = forecast_lines(objective, read_table([path]))
    assert [(line["id"], line["step"]) for line in lines] == [(name, step) for name in "ba" for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(("names", "found"), [(["Timestamp"], "Timestamp"), (["ds", "time"], None)])
def test_the_column_of_times_is_found_under_a_usual_name_unless_there_are_two(names, found, tmp_path):
    path = tmp_path / "x.csv"
    rows = [",".join([*[str(time.date())] * len(names), "1"]) for time in pd.date_range("2024-01-01", periods=60)]
    path.write_text("\n".join([",".join([*names, "a"]), *rows]), encoding="utf-8")
    if found is None:
        with pytest.raises(ValueError, match="time_column='date' is not in the train data; its columns are ds, time"):
            read(str(path))
        return
    data = read(str(path))
    assert data.args.time_column == found
    assert f"columns: time_column={found}" in data.notes


def test_errors_name_the_remedy(tmp_path):
    path = write(tmp_path / "x.csv", numbers())
    with pytest.raises(ValueError, match=r"time_column='when' is not in the train data.*time_column=none reads"):
        read(path, time_column="when")
    with pytest.raises(ValueError, match=r"ends with row 90; the table has 60 rows: give shares, which fit any"):
        bind(read(path, split_rows=[90, 8, 8]))
    with pytest.raises(ValueError, match=r"are too few for one window; .* lower these, or give this part more rows"):
        bind(read(path, split_rows=[56, 2, 2]))
    with pytest.raises(ValueError, match=r"time_format='day first' is unknown; choose one of year_first, day_first"):
        read(path, time_format="day first")


def test_what_changes_a_metric_depends_on_the_metric_and_on_the_tables(tmp_path):
    path = write(tmp_path / "x.csv", numbers())
    one_table = TimeSeriesForecastingArguments(dataset=path)
    both = {"id_column", "prediction_length"}
    assert set(one_table.settings_that_change("mse")) == both
    assert set(one_table.settings_that_change("mase")) == both | {"season"}
    assert set(one_table.settings_that_change("loss")) == both | {"series_loss"}
    two_tables = TimeSeriesForecastingArguments(train_file=[path], validation_file=[path])
    assert set(two_tables.settings_that_change("mse")) == both | {"context_length"}


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def trained(tmp_path_factory, seed_argv):
    """The folder of a finished run of the smoke preset."""
    folder = tmp_path_factory.mktemp("series") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        finetune.main([*SMOKE, "--output_dir", str(folder), *seed_argv])
    return folder


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.trains
def test_the_smoke_run_beats_the_naive_forecasts_and_is_evaluated_exactly(trained, tmp_path):
    metrics = json.loads((trained / "run.json").read_text())["metrics"]
    assert metrics["test/mse"] < metrics["test/seasonal_naive_mse"] / 4 < metrics["test/naive_mse"]
    evaluate.main(["--model", str(trained), "--batch_size", "7", "--output", str(tmp_path / "metrics.json")])
    again = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
    assert again == pytest.approx(tested, rel=1e-4)
    assert (trained / "report.html").read_text().count("Error by step ahead") >= 1


@pytest.mark.trains
def test_forecasts_are_lines_of_the_future_in_units_of_the_data(trained, tmp_path):
    output = tmp_path / "forecast.csv"
    predict.main(["--model", str(trained), "--input", str(WAVES), "--output", str(output)])
    lines = pd.read_csv(output)
    assert list(lines.columns) == ["date", "column", "prediction", "q0.1", "q0.5", "q0.9"]
    assert lines["column"].tolist() == [name for name in ("north", "south", "total") for _ in range(24)]
    expected = pd.date_range("2024-02-11 16:00:00", periods=24, freq="1h")  # 1,000 hours after new year
    assert pd.to_datetime(lines["date"][:24]).tolist() == list(expected)
    assert (lines["prediction"] == lines["q0.5"]).all()
    # what make_waves.py would have written next, without its noise
    steps = 1000 + np.arange(24)
    north = 20 + 6 * np.sin(2 * np.pi * steps / 24) + 3 * np.sin(2 * np.pi * steps / 168) + steps / 200
    assert np.abs(lines["prediction"][:24] - north).mean() < 1
    short = tmp_path / "short.csv"
    short.write_text("\n".join((WAVES / "waves.csv").read_text().splitlines()[:50]))
    with pytest.raises(
        ValueError, match=r"the input rows: 49 rows are too few for one window; it needs context_length=96$"
    ):
        predict.main(["--model", str(trained), "--input", str(short), "--output", str(output)])


def test_a_table_without_a_future_column_or_with_other_columns(trained, tmp_path):
    rows = [line.rsplit(",", 1)[0] for line in (WAVES / "waves.csv").read_text().splitlines()[:200]]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="target_columns='total' is not in the input data; its columns are date"):
        predict.main(
            ["--model", str(trained), "--input", str(tmp_path / "two.csv"), "--output", str(tmp_path / "f.csv")]
        )


@pytest.mark.trains
def test_series_are_pretrained_by_forecasting_and_then_forecast_together_with_another_model(tmp_path, seed_argv):
    folder = tmp_path / "pretrained"
    config = str(short_config(tmp_path))
    pretrain.main(["--task", "time_series_forecasting", "--config", config, "--output_dir", str(folder), *seed_argv])
    run = json.loads((folder / "run.json").read_text())
    assert run["metrics"]["validation/mse"] < run["metrics"]["validation/naive_mse"]
    assert run["data"]["series"]["columns"] == ["north", "south", "total"]
    output = tmp_path / "forecast.jsonl"
    predict.main(["--model", str(folder), "--input", str(WAVES), "--output", str(output)])
    line = json.loads(output.read_text().splitlines()[0])
    assert (line["date"], line["column"]) == ("2024-02-11 16:00:00", "north")
    assert 10 < line["prediction"] < 40


def short_config(tmp_path):
    config = tmp_path / "pretrain.yaml"
    fields = {
        "task": "time_series_forecasting", "dataset": str(WAVES), "split_rows": [0.6, 0.2, 0.2],
        "model_type": "bm_rnn", "cell_type": "mingru", "hidden_size": 32, "num_hidden_layers": 1, "patch_size": 12,
        "num_input_channels": 3, "batch_size": 32, "num_train_steps": 60, "learning_rate": 0.01, "eval_steps": 30,
    }  # fmt: skip
    config.write_text("\n".join(f"{key}: {value}" for key, value in fields.items()))
    return config


@pytest.mark.trains
def test_an_adapter_of_a_forecaster_knows_the_scale_it_was_trained_with(trained, tmp_path, seed_argv):
    folder = tmp_path / "adapter"
    other = write(tmp_path / "other.csv", 1000 * numbers(300, 3), names=("north", "south", "total"))
    finetune.main([
        *SMOKE, "--model", str(trained), "--dataset", other, "--adapter", "lora", "--max_steps", "2",
        "--output_dir", str(folder), "--split_rows", "150", "100", "50", *seed_argv,
    ])  # fmt: skip
    predict.main(["--model", str(folder), "--input", other, "--output", str(tmp_path / "forecast.csv")])
    lines = pd.read_csv(tmp_path / "forecast.csv")
    assert lines["prediction"][lines["column"] == "south"].between(-60000, 20000).all()
    assert lines["prediction"][lines["column"] == "south"].mean() < -5000


def test_the_shipped_waves_are_what_their_script_writes(tmp_path):
    runpy.run_path(str(WAVES / "make_waves.py"))["main"](tmp_path)
    assert (tmp_path / "waves.csv").read_bytes() == (WAVES / "waves.csv").read_bytes()
