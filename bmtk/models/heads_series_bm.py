"""Series head.  B rows, T past steps, H predicted steps, C channels, F time features, Q quantiles, D width.

A direct forecast of all H steps (not autoregressive), in the unit of the series: the head reverses the stem's instance
normalization (Kim et al. 2022).  Expects a SeriesStem at `model.stem`.  With `linear_forecast`, a linear map of the
normalized past is added, which many series need no more than (Zeng et al. 2022, arXiv:2205.13504; Li et al. 2023,
arXiv:2305.10721, with the normalization).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput, can_return_tuple

from .heads_bm import check_input
from .stems_series_bm import Instance, check_time_features
from .zero_start_bm import ZeroLinear

SMALLEST_SCALE = 1e-6  # of a Student-t distribution, in standard deviations of the row


@dataclass
class TimeSeriesOutput(ModelOutput):
    """`prediction` (B, H, C): the point forecast, the median, or the mean of the Student-t distribution.

    `quantiles` (B, H, C, Q) for series_loss "quantile"; `df` and `scale` (B, H, C) for "student_t".
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    quantiles: torch.Tensor | None = None
    df: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class PointForecast:
    """One number per step and channel; `loss(prediction, truth, reduction=...)` is torch's."""

    num_outputs = 1

    def __init__(self, loss):
        self.elementwise = loss

    def output(self, raw: torch.Tensor, instance: Instance) -> TimeSeriesOutput:
        return TimeSeriesOutput(prediction=raw[..., 0] * instance.std + instance.mean)

    def losses(self, output: TimeSeriesOutput, truth: torch.Tensor) -> torch.Tensor:
        return self.elementwise(output.prediction, truth, reduction="none")


class QuantileForecast:
    """Quantiles q; loss: the mean of max(q (y - x), (q - 1) (y - x)), pinball loss (Koenker & Bassett 1978)."""

    def __init__(self, quantiles: list[float]):
        if 0.5 not in quantiles or not all(0 < q < 1 for q in quantiles):
            raise ValueError(
                f"quantiles={quantiles} must lie between 0 and 1, and 0.5, the prediction, be one of them"
            )
        self.levels, self.num_outputs = quantiles, len(quantiles)

    def output(self, raw: torch.Tensor, instance: Instance) -> TimeSeriesOutput:
        quantiles = raw * instance.std[..., None] + instance.mean[..., None]
        return TimeSeriesOutput(prediction=quantiles[..., self.levels.index(0.5)], quantiles=quantiles)

    def losses(self, output: TimeSeriesOutput, truth: torch.Tensor) -> torch.Tensor:
        levels = torch.tensor(self.levels, device=truth.device)
        error = truth[..., None] - output.quantiles
        return torch.maximum(levels * error, (levels - 1) * error).mean(-1)


class StudentTForecast:
    """Student-t distribution (Salinas et al. 2017, arXiv:1704.04110) with more than 2 degrees of freedom."""

    num_outputs = 3

    def output(self, raw: torch.Tensor, instance: Instance) -> TimeSeriesOutput:
        mean, spread, freedom = raw.unbind(-1)
        return TimeSeriesOutput(
            prediction=mean * instance.std + instance.mean,
            df=2 + F.softplus(freedom),
            scale=(F.softplus(spread) + SMALLEST_SCALE) * instance.std,
        )

    def losses(self, output: TimeSeriesOutput, truth: torch.Tensor) -> torch.Tensor:
        distribution = torch.distributions.StudentT(output.df, output.prediction, output.scale, validate_args=False)
        return -distribution.log_prob(truth)


FORECASTS = {
    "mse": lambda config: PointForecast(F.mse_loss),
    "mae": lambda config: PointForecast(F.l1_loss),
    "huber": lambda config: PointForecast(F.huber_loss),  # quadratic up to an error of 1, in the unit of the series
    "quantile": lambda config: QuantileForecast(config.quantiles),
    "student_t": lambda config: StudentTForecast(),
}


class TimeSeriesPredictionHead:
    """Predicts `prediction_length` steps from the last position of a causal trunk, otherwise from all positions."""

    main_input_name = "past_values"

    def __init__(self, config):
        check_input(config, type(self).__name__, "series")
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.forecast = FORECASTS[config.series_loss](config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        num_read = 1 if config.is_causal else self.model.stem.num_positions
        per_step = config.num_input_channels * self.forecast.num_outputs
        self.projection = nn.Linear(num_read * config.hidden_size, config.prediction_length * per_step)
        has_calendar = config.num_time_features > 0
        self.calendar = nn.Linear(config.num_time_features, per_step, bias=False) if has_calendar else None
        steps = config.context_length, config.prediction_length * self.forecast.num_outputs
        self.linear = ZeroLinear(*steps) if config.linear_forecast else None  # the same for every channel
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        future_time_features: torch.Tensor | None = None,
        future_values: torch.Tensor | None = None,
        future_observed_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TimeSeriesOutput:
        """past_* (B, T, C or F), future_* (B, H, C or F); masks hold 1 where a value was observed.

        Loss in the unit of the series; an item is an observed value of the future.
        """
        config = self.config
        check_time_features(
            "future_time_features", future_time_features, config.prediction_length, config.num_time_features
        )
        kwargs.setdefault("use_cache", False)
        outputs = self.model(
            past_values=past_values,
            past_observed_mask=past_observed_mask,
            past_time_features=past_time_features,
            **kwargs,
        )
        positions = outputs.last_hidden_state
        read = self.dropout(positions[:, -1] if config.is_causal else positions.flatten(1))
        raw = self.projection(read).unflatten(1, (config.prediction_length, -1))  # (B, H, C * outputs)
        if self.calendar is not None:
            raw = raw + self.calendar(future_time_features.to(raw.dtype))
        raw = raw.float().unflatten(2, (config.num_input_channels, -1))
        instance = Instance.of(past_values, past_observed_mask)
        if self.linear is not None:
            raw = raw + self.read_linearly(instance.normalize(past_values, past_observed_mask))
        forecast = self.forecast.output(raw, instance)
        loss = None
        if future_values is not None:
            loss = self.loss(forecast, future_values, future_observed_mask, num_items_in_batch)
        # Made anew: a field that is set later stands behind the others, and callers read the loss from `outputs[0]`.
        return TimeSeriesOutput(
            loss=loss, **forecast, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def read_linearly(self, normalized: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, H, C, outputs)."""
        steps = self.linear(normalized.to(self.linear.weight.dtype).transpose(1, 2)).float()  # (B, C, H * outputs)
        return steps.unflatten(2, (self.config.prediction_length, -1)).transpose(1, 2)

    def loss(self, output: TimeSeriesOutput, truth, observed=None, num_items_in_batch=None) -> torch.Tensor:
        if truth.shape != output.prediction.shape:
            raise ValueError(
                f"future_values has shape {tuple(truth.shape)}; prediction_length and num_input_channels want "
                f"{tuple(output.prediction.shape)}"
            )
        is_observed = torch.ones_like(truth, dtype=torch.bool) if observed is None else observed.bool()
        truth = torch.where(is_observed, truth.float(), output.prediction.detach())  # a missing value may be NaN
        total = self.forecast.losses(output, truth).where(is_observed, 0).sum()
        return total / (is_observed.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


__all__ = ["TimeSeriesOutput", "TimeSeriesPredictionHead"]
