"""Series stem: from time steps to positions.  B rows, T steps, C channels, F time features, D width.

Sources: instance normalization, Kim et al. 2022 (RevIN, without its affine part), openreview.net/forum?id=cGDAkQo1C0p;
patches, Nie et al. 2022, arXiv:2211.14730, here over all channels together and without overlap.
"""

from typing import NamedTuple

import torch
from torch import nn

VARIANCE_FLOOR = 1e-5  # added to the variance, which is 0 for a constant channel


class Instance(NamedTuple):
    """Mean and standard deviation of each row and channel, (B, 1, C), over its observed steps."""

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, observed: torch.Tensor | None) -> "Instance":
        """Of (B, T, C), where `observed` (B, T, C) is 1; a channel never observed has mean 0 and variance 0."""
        values = values.float()
        weights = torch.ones_like(values) if observed is None else observed.to(values.dtype)
        values = values.where(weights > 0, 0)  # a missing value may be NaN
        count = weights.sum(1, keepdim=True).clamp(min=1)
        mean = (values * weights).sum(1, keepdim=True) / count
        variance = ((values - mean).square() * weights).sum(1, keepdim=True) / count
        return cls(mean, (variance + VARIANCE_FLOOR).sqrt())

    def normalize(self, values: torch.Tensor, observed: torch.Tensor | None) -> torch.Tensor:
        """(B, T, C) with mean 0 and deviation 1, and 0 where nothing was observed."""
        normalized = (values.float() - self.mean) / self.std
        return normalized if observed is None else normalized.where(observed > 0, 0)


class SeriesStem(nn.Module):
    """Patches of `patch_size` steps, each with normalized values, observation mask and time features."""

    input_names = ("past_values", "past_observed_mask", "past_time_features")
    input_layer = "embed_patches"

    def __init__(self, config):
        super().__init__()
        self.context_length, self.patch_size = config.context_length, config.patch_size
        self.num_channels, self.num_time_features = config.num_input_channels, config.num_time_features
        self.num_positions = config.context_length // config.patch_size
        width = config.patch_size * (2 * config.num_input_channels + config.num_time_features)
        self.embed_patches = nn.Linear(width, config.hidden_size)

    def embed(self, past_values: torch.Tensor, past_observed_mask=None, past_time_features=None, attention_mask=None):
        """(B, T, C), (B, T, C) of 0 and 1, (B, T, F) -> positions (B, T / patch_size, D), and None: all are real."""
        self.check(past_values, past_observed_mask, past_time_features)
        observed = torch.ones_like(past_values) if past_observed_mask is None else past_observed_mask
        normalized = Instance.of(past_values, past_observed_mask).normalize(past_values, past_observed_mask)
        steps = [normalized, observed] if past_time_features is None else [normalized, observed, past_time_features]
        steps = torch.cat([part.to(self.embed_patches.weight.dtype) for part in steps], dim=-1)  # (B, T, 2C + F)
        patches = steps.unflatten(1, (self.num_positions, self.patch_size)).flatten(2)
        return self.embed_patches(patches), None

    def check(self, past_values, past_observed_mask, past_time_features) -> None:
        wanted = (self.context_length, self.num_channels)
        if tuple(past_values.shape[1:]) != wanted:
            raise ValueError(
                f"past_values has shape {tuple(past_values.shape)}; context_length={wanted[0]} and num_input_channels="
                f"{wanted[1]} want (rows, {wanted[0]}, {wanted[1]}).  Mark what is missing by past_observed_mask"
            )
        if past_observed_mask is not None and past_observed_mask.shape != past_values.shape:
            raise ValueError(
                f"past_observed_mask has shape {tuple(past_observed_mask.shape)}, past_values "
                f"{tuple(past_values.shape)}; give both the same"
            )
        check_time_features("past_time_features", past_time_features, self.context_length, self.num_time_features)


def check_time_features(name: str, features: torch.Tensor | None, num_steps: int, num_features: int) -> None:
    shape = None if features is None else tuple(features.shape)
    if (shape and shape[1:]) != ((num_steps, num_features) if num_features else None):
        wanted = f"wants (rows, {num_steps}, {num_features})" if num_features else "wants none"
        raise ValueError(f"{name} has shape {shape}; num_time_features={num_features} {wanted}")


__all__ = ["Instance", "SeriesStem", "check_time_features"]
