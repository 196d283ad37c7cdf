"""Image stems: patches for a Transformer, pixels for a CNN.  B images, C channels, H x W pixels, L positions, D width.

An image stem has `width` (output channels) and `num_prefix_tokens` (positions before the first one of the grid).
`bool_masked_pos` (B, M) marks masked cells of a square grid over the image, row by row.  Their pixels are set to 0, so
that overlapping convolutions do not read them, and the outputs at these positions become `mask_token` (width,).
Sources: patches, Dosovitskiy et al. 2020, arXiv:2010.11929; masks, Xie et al. 2022 (SimMIM), arXiv:2111.09886.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .dropout_bm import BmDropout
from .image_blocks_bm import POOLS, ConvNormAct, build_norm
from .stems_bm import SinusoidalPositions


class PatchStem(nn.Module):
    """pixel_values (B, C, H, W) -> (B, prefix + L, D): patches row by row, positions, dropout.

    With `classifier_pooling="first"` the first position is a learned class token, as in ViT.
    """

    input_layer = "embed_patches"

    def __init__(self, config):
        super().__init__()
        self.patch_size, self.num_channels, self.width = config.patch_size, config.num_channels, config.hidden_size
        self.num_prefix_tokens = int(config.classifier_pooling == "first")
        self.embed_patches = nn.Conv2d(config.num_channels, self.width, config.patch_size, stride=config.patch_size)
        self.embed_class = nn.Embedding(1, self.width) if self.num_prefix_tokens else None
        length = (config.image_size // config.patch_size) ** 2 + self.num_prefix_tokens
        self.embed_positions = {
            "learned": lambda: nn.Embedding(length, self.width),
            "sinusoidal": lambda: SinusoidalPositions(self.width),
        }.get(config.position_embedding_type, lambda: None)()
        self.dropout = BmDropout(config.embedding_dropout)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos=None, mask_token=None) -> torch.Tensor:
        check_channels(pixel_values, self.num_channels)
        check_divisible(pixel_values, self.patch_size)
        if bool_masked_pos is not None:
            pixel_values = hide_pixels(pixel_values, bool_masked_pos)
        patches = self.embed_patches(pixel_values.to(self.embed_patches.weight.dtype))  # (B, D, H/P, W/P)
        if bool_masked_pos is not None:
            patches = put_mask_token(patches, bool_masked_pos, pixel_values, mask_token)
        x = patches.flatten(2).transpose(1, 2)  # (B, L, D)
        if self.embed_class is not None:
            # Through the module, not by its weight: offloaded weights are loaded when their module is called.
            places = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
            x = torch.cat((self.embed_class(places), x), dim=1)
        if self.embed_positions is not None:
            x = x + self.positions(x.shape[1], x.device).to(x.dtype)
        return self.dropout(x)

    def positions(self, length: int, device) -> torch.Tensor:
        if isinstance(self.embed_positions, nn.Embedding) and length != self.embed_positions.num_embeddings:
            raise ValueError(
                f"the image gives {length} positions, but {self.embed_positions.num_embeddings} were learned; resize "
                "it to image_size, or choose position_embedding_type='sinusoidal'"
            )
        return self.embed_positions(torch.arange(length, device=device)[None])


class PixelStem(nn.Module):
    """pixel_values (B, C, H, W) -> (B, width, H', W'): identity ("none"), convolution and pooling, or patches."""

    input_names = ("pixel_values", "bool_masked_pos", "mask_token")
    input_layer = "layers"
    num_prefix_tokens = 0

    def __init__(self, config):
        super().__init__()
        self.num_channels, self.width = config.num_channels, config.stem_width
        channels = (config.num_channels, self.width)
        if config.stem_type == "none":
            self.layers = nn.Identity()
        elif config.stem_type == "patch":
            patches = nn.Conv2d(*channels, config.patch_size, stride=config.patch_size)
            self.layers = nn.Sequential(patches, build_norm(config, self.width))
        else:
            conv = ConvNormAct(config, *channels, kernel_size=config.stem_kernel_size, stride=config.stem_stride)
            pool = POOLS[config.pooling_type](3, stride=2, padding=1) if config.stem_pooling else nn.Identity()
            self.layers = nn.Sequential(conv.insert(1, pool)) if config.stem_pools_first else nn.Sequential(conv, pool)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos=None, mask_token=None) -> torch.Tensor:
        check_channels(pixel_values, self.num_channels)
        if bool_masked_pos is not None:
            pixel_values = hide_pixels(pixel_values, bool_masked_pos)
        x = self.layers(pixel_values)
        return x if bool_masked_pos is None else put_mask_token(x, bool_masked_pos, pixel_values, mask_token)


def mask_grid(bool_masked_pos: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, M) -> (B, 1, rows, columns): the mask on its grid of square cells."""
    height, width = pixel_values.shape[-2:]
    cell = math.isqrt(height * width // bool_masked_pos.shape[1])
    if cell == 0 or height % cell or width % cell or (height // cell) * (width // cell) != bool_masked_pos.shape[1]:
        raise ValueError(
            f"bool_masked_pos has {bool_masked_pos.shape[1]} cells, which no square grid over {height} x {width} "
            "pixels has; its second dimension is (height / cell) * (width / cell)"
        )
    return bool_masked_pos.bool().view(-1, 1, height // cell, width // cell)


def mask_of_size(bool_masked_pos: torch.Tensor, pixel_values: torch.Tensor, size) -> torch.Tensor:
    """The mask as (B, 1, *size): a position is masked if its centre lies in a masked cell."""
    return F.interpolate(
        mask_grid(bool_masked_pos, pixel_values).float(), size=tuple(size), mode="nearest-exact"
    ).bool()


def hide_pixels(pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
    return pixel_values.masked_fill(mask_of_size(bool_masked_pos, pixel_values, pixel_values.shape[-2:]), 0)


def put_mask_token(x: torch.Tensor, bool_masked_pos, pixel_values, mask_token: torch.Tensor) -> torch.Tensor:
    hidden = mask_of_size(bool_masked_pos, pixel_values, x.shape[-2:])
    return torch.where(hidden, mask_token.to(x.dtype)[:, None, None], x)


def check_channels(pixel_values: torch.Tensor, num_channels: int) -> None:
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; num_channels={num_channels} wants (images, "
            f"{num_channels}, height, width)"
        )


def check_divisible(pixel_values: torch.Tensor, patch_size: int) -> None:
    height, width = pixel_values.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height} x {width} pixels is not a whole number of patches of patch_size={patch_size}; "
            "resize it"
        )


__all__ = ["PatchStem", "PixelStem", "mask_of_size"]
