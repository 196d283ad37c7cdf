"""Audio stem: log-mel frames to positions, four frames each.  B rows, T frames, F mel bands, L positions, D width.

Source: two convolutions of kernel 3, as before the Transformer of Radford et al. 2022, arXiv:2212.04356 (whose first
has stride 1; strides of 2 for both: Gulati et al. 2020, arXiv:2005.08100).
"""

import torch
from torch import nn

KERNEL, STRIDE, PADDING = 3, 2, 1  # of each convolution


class AudioStem(nn.Module):
    """A position reads 3 frames before and 3 after its own, also in a causal model."""

    input_names = ("input_features",)
    input_layer = "conv1"

    def __init__(self, config):
        super().__init__()
        self.num_mel_bins = config.num_mel_bins
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, KERNEL, stride=STRIDE, padding=PADDING)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, KERNEL, stride=STRIDE, padding=PADDING)
        self.act = nn.GELU()

    def embed(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None):
        """Frames (B, T, F) and their mask (B, T) -> positions (B, L, D) and their mask (B, L), or None without one.

        Positions are on the left and padding on the right, whichever side the frames are padded on: so the strided
        convolutions group the same frames, and read zeros after the last.
        """
        if input_features.ndim != 3 or input_features.shape[-1] != self.num_mel_bins:
            raise ValueError(
                f"input_features has shape {tuple(input_features.shape)}; num_mel_bins={self.num_mel_bins} wants "
                f"(rows, frames, {self.num_mel_bins})"
            )
        x = input_features.to(self.conv1.weight.dtype)
        mask = None
        if attention_mask is not None:
            x, mask = to_the_left(x, attention_mask)
            x = x * mask[..., None]
        x = x.transpose(1, 2)
        for conv in (self.conv1, self.conv2):
            x = self.act(conv(x))
            if mask is not None:
                mask = mask[:, ::STRIDE]
                x = x * mask[:, None]
        return x.transpose(1, 2), None if mask is None else mask.to(attention_mask.dtype)

    @staticmethod
    def output_lengths(lengths):
        """Number of positions for a number of frames (an integer or a tensor): twice halved and rounded up."""
        for _ in range(2):
            lengths = (lengths + 2 * PADDING - KERNEL) // STRIDE + 1
        return lengths


def to_the_left(x: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the real part of every row of (B, T, F) to its beginning; also returns the mask (B, T) of what is real."""
    steps = torch.arange(x.shape[1], device=x.device)[None]
    first = attention_mask.long().argmax(-1, keepdim=True)
    source = (steps + first) % x.shape[1]
    mask = (steps < attention_mask.long().sum(-1, keepdim=True)).to(x.dtype)
    return x.gather(1, source[..., None].expand_as(x)), mask


__all__ = ["AudioStem"]
