"""Series: forecasts and losses written out by hand, instance normalisation, what is missing, what is refused."""

import math

import pytest
import torch
from model_cases import CASES
from torch import nn

import bmtk  # noqa: F401  (registers the families)
from bmtk.models.stems_series_bm import Instance

TOLERANCE = 1e-5
CASE = CASES["transformer_series-TimeSeriesPrediction"]
LOSSES = ("mse", "mae", "huber", "quantile", "student_t")


def model_of(**changes) -> nn.Module:
    return CASE.model(**{"series_loss": "mse", "initializer_range": 0.1, **changes})


def batch_of(seed: int = 1) -> dict[str, torch.Tensor]:
    return CASE.batch(seed=seed)


def one_loss(kind: str, outputs, index: tuple, truth: float) -> float:
    """The loss of one value, in Python floats."""
    prediction = outputs.prediction[index].item()
    error = truth - prediction
    if kind == "mse":
        return error**2
    if kind == "mae":
        return abs(error)
    if kind == "huber":
        return error**2 / 2 if abs(error) <= 1 else abs(error) - 0.5
    if kind == "quantile":
        values = zip((0.1, 0.5, 0.9), outputs.quantiles[index].tolist(), strict=True)
        return sum(level * (truth - x) if truth > x else (1 - level) * (x - truth) for level, x in values) / 3
    df, scale = outputs.df[index].item(), outputs.scale[index].item()
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(scale) - math.log(df * math.pi) / 2
    return (df + 1) / 2 * math.log1p((error / scale) ** 2 / df) - constant


@pytest.mark.parametrize("kind", LOSSES)
@torch.no_grad()
def test_losses_by_hand(kind):
    model, batch = model_of(series_loss=kind), batch_of()
    outputs = model(**batch)
    observed = batch["future_observed_mask"].nonzero().tolist()
    total = sum(one_loss(kind, outputs, tuple(i), batch["future_values"][tuple(i)].item()) for i in observed)
    assert abs(outputs.loss.item() - total / len(observed)) <= 1e-4 * max(1, outputs.loss.item())
    assert outputs.prediction.shape == (4, 5, 2)


@pytest.mark.parametrize("kind", LOSSES)
@torch.no_grad()
def test_forecasts_follow_the_unit_of_the_series(kind):
    """y = a x + b of the past gives a f + b of the forecast, for each channel: nothing else sees the unit."""
    model, batch = model_of(series_loss=kind), batch_of()
    del batch["future_values"], batch["future_observed_mask"]
    a, b = torch.tensor([8.0, 0.25]), torch.tensor([-100.0, 3.0])
    plain = model(**batch)
    moved = model(**{**batch, "past_values": batch["past_values"] * a + b})
    assert (moved.prediction - (plain.prediction * a + b)).abs().max() <= 5e-3
    if kind == "student_t":
        assert (moved.scale / (plain.scale * a) - 1).abs().max() <= 1e-3
        assert (plain.df > 2).all()
    if kind == "quantile":
        assert (moved.quantiles - (plain.quantiles * a[:, None] + b[:, None])).abs().max() <= 5e-3
        assert torch.equal(plain.prediction, plain.quantiles[..., 1])


def test_instance_statistics_are_of_observed_steps():
    values = torch.tensor([[1.0, 2.0, float("nan"), 3.0], [5.0, 5.0, 5.0, 5.0]])[..., None]
    observed = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]])[..., None]
    instance = Instance.of(values, observed)
    assert instance.mean.flatten().tolist() == [2.0, 0.0]
    expected = [math.sqrt(2 / 3 + 1e-5), math.sqrt(1e-5)]
    assert instance.std.flatten().tolist() == pytest.approx(expected)
    assert Instance.of(values[1:], None).mean.item() == 5.0


@torch.no_grad()
def test_missing_values_are_not_read():
    model, batch = model_of(), batch_of()
    mask = torch.ones_like(batch["past_values"])
    mask[:, 3:5, 1] = 0
    hidden = batch["past_values"].masked_fill(mask == 0, float("nan"))
    other = batch["past_values"].masked_fill(mask == 0, 1e6)
    first, second = (model(**{**batch, "past_values": x, "past_observed_mask": mask}).loss for x in (hidden, other))
    assert first.isfinite()
    assert first == second
    assert first != model(**batch).loss
    future = batch["future_values"].masked_fill(batch["future_observed_mask"] == 0, float("nan"))
    assert model(**{**batch, "future_values": future}).loss == model(**batch).loss


def test_gradients_are_finite_where_values_are_missing():
    model, batch = model_of(series_loss="student_t"), batch_of()
    batch["future_values"] = batch["future_values"].masked_fill(batch["future_observed_mask"] == 0, float("nan"))
    batch["past_observed_mask"] = torch.zeros_like(batch["past_values"])
    model(**batch).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_constant_series_stay_finite():
    batch = {**batch_of(), "past_values": torch.full((4, 12, 2), 3.0)}
    assert model_of(series_loss="student_t")(**batch).loss.isfinite()


@torch.no_grad()
def test_calendars_of_past_and_future_are_read():
    model, batch = model_of(), batch_of()
    for name in ("past_time_features", "future_time_features"):
        changed = model(**{**batch, name: batch[name] + 1}).prediction
        assert (changed - model(**batch).prediction).abs().max() > 1e-3, name


@torch.no_grad()
def test_a_causal_trunk_reads_its_last_position_only():
    model, batch = model_of(is_causal=True), batch_of()
    assert model.projection.in_features == 32
    assert model_of(is_causal=False).projection.in_features == 32 * 4
    hidden = model.model(past_values=batch["past_values"], past_time_features=batch["past_time_features"])
    raw = model.projection(hidden.last_hidden_state[:, -1]).view(4, 5, 2) + model.calendar(
        batch["future_time_features"]
    )
    instance = Instance.of(batch["past_values"], None)
    expected = raw * instance.std + instance.mean
    assert (model(**batch).prediction - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal", "learned"])
@torch.no_grad()
def test_position_embeddings_distinguish_equal_patches(positions):
    """Patches in another order are not the same patches in another order: each knows its place."""
    model = model_of(position_embedding_type=positions, initializer_range=0.5, num_time_features=0)
    values = torch.randn(1, 12, 2)
    hidden = model.model(past_values=values).last_hidden_state
    swapped = model.model(past_values=values.unflatten(1, (4, 3)).flip(1).flatten(1, 2)).last_hidden_state.flip(1)
    assert (hidden - swapped).abs().max() > 1e-2


@pytest.mark.parametrize("patch_size", [1, 3, 12])
@torch.no_grad()
def test_patches_hold_consecutive_steps(patch_size):
    model = model_of(patch_size=patch_size, num_time_features=0)
    model.model.stem.embed_patches.weight.fill_(0)
    model.model.stem.embed_patches.weight[0, 0] = 1  # the first number of the first step of a patch
    values = torch.randn(1, 12, 2)
    positions, _ = model.model.stem.embed(values)
    instance = Instance.of(values, None)
    normalised = ((values - instance.mean) / instance.std)[0, ::patch_size, 0]
    bias = model.model.stem.embed_patches.bias[0]
    assert (positions[0, :, 0] - bias - normalised).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past_values": torch.zeros(4, 11, 2)}, r"context_length=12 and num_input_channels=2 want \(rows, 12, 2\)"),
        ({"past_observed_mask": torch.zeros(4, 12, 1)}, "give both the same"),
        (
            {"past_time_features": None},
            r"past_time_features has shape None; num_time_features=2 wants \(rows, 12, 2\)",
        ),
        ({"future_time_features": torch.zeros(4, 5, 1)}, r"future_time_features .* wants \(rows, 5, 2\)"),
        ({"future_values": torch.zeros(4, 4, 2)}, r"prediction_length and num_input_channels want \(4, 5, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**{**batch_of(), **changes})


def test_quantiles_must_hold_the_median():
    with pytest.raises(ValueError, match=r"quantiles=\[0.1, 0.9\] must lie between 0 and 1, and 0.5"):
        model_of(series_loss="quantile", quantiles=[0.1, 0.9])
    assert model_of(series_loss="quantile", quantiles=[0.5, 0.9]).projection.out_features == 5 * 2 * 2
    with pytest.raises(ValueError, match="num_time_features=0 wants none"):
        model_of(num_time_features=0)(**batch_of())


@pytest.mark.trains
def test_a_sine_is_continued(training_seed):
    """Forecasting works: half a minute of steps on waves of random phase, then waves never seen."""
    changes = {"series_loss": "mae", "num_time_features": 0, "num_input_channels": 1, "context_length": 24}
    model = model_of(seed=training_seed, patch_size=4, **changes)
    torch.manual_seed(2 + training_seed)

    def waves(count: int) -> torch.Tensor:
        phase, size = torch.rand(count, 1) * 2 * math.pi, torch.rand(count, 1) * 10 + 1
        return (size * torch.sin(torch.arange(29) * 2 * math.pi / 12 + phase) + 5 * size)[..., None]

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        x = waves(32)
        loss = model(past_values=x[:, :24], future_values=x[:, 24:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = waves(64)
    with torch.no_grad():
        error = model(past_values=x[:, :24], future_values=x[:, 24:]).loss
    naive = (x[:, 24:] - x[:, 23:24]).abs().mean()
    assert error < naive / 10


@torch.no_grad()
def test_a_linear_forecast_adds_one_map_of_the_normalized_past_for_all_channels():
    plain, model = (model_of(series_loss="quantile", linear_forecast=added) for added in (False, True))
    batch = batch_of()
    batch["past_observed_mask"] = torch.rand(batch["past_values"].shape) < 0.7
    assert set(model.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {
        "linear.weight",
        "linear.bias",
    }
    torch.testing.assert_close(model(**batch).quantiles, plain(**batch).quantiles)  # it starts at 0
    nn.init.normal_(model.linear.weight)
    nn.init.normal_(model.linear.bias)
    added, instance = model(**batch).quantiles, Instance.of(batch["past_values"], batch["past_observed_mask"])
    for row, step, channel, output in ((0, 0, 0, 0), (1, 4, 1, 2), (3, 2, 0, 1)):
        total = model.linear.bias[3 * step + output].item()
        for past, weight in enumerate(model.linear.weight[3 * step + output].tolist()):
            if batch["past_observed_mask"][row, past, channel]:
                value = batch["past_values"][row, past, channel] - instance.mean[row, 0, channel]
                total += weight * (value / instance.std[row, 0, channel]).item()
        expected = plain(**batch).quantiles[row, step, channel, output] + total * instance.std[row, 0, channel]
        torch.testing.assert_close(added[row, step, channel, output], expected, rtol=1e-4, atol=1e-4)
