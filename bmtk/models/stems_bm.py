"""Stems: how an input becomes positions.  B rows, L positions, D width.

One stem per kind of input, written once and uploaded with every family: tokens here, audio in stems_audio_bm.py,
series in stems_series_bm.py, images in stems_image_bm.py.  `stem.embed(...)` computes embeddings, AddPositions adds
position embeddings.  The stems file of each family chooses among them.
Source: sinusoidal positions, Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; learned positions, Gehring et al. 2017.
"""

import math
import re

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .dropout_bm import BmDropout
from .zero_start_bm import StartsAtZero

logger = logging.get_logger(__name__)


class SinusoidalPositions(nn.Module):
    """position_ids (B, L) -> (B, L, D): sines in even, cosines in odd columns; no parameters or buffers."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        pairs = torch.arange(0, self.hidden_size, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * torch.exp(pairs * (-math.log(10000.0) / self.hidden_size))
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (B, L, D)


class AddPositions:
    """The second half of a stem: learned, sinusoidal or no absolute positions are added, then dropout."""

    positions_class: type[nn.Embedding] = nn.Embedding  # of learned ones
    embed_positions: nn.Module | None
    dropout: nn.Dropout

    def build_positions(self, config, num_positions: int) -> None:
        self.embed_positions = {
            "learned": lambda: self.positions_class(num_positions, config.hidden_size),
            "sinusoidal": lambda: SinusoidalPositions(config.hidden_size),
        }.get(config.position_embedding_type, lambda: None)()
        self.dropout = BmDropout(config.embedding_dropout)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if self.embed_positions is not None:
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids).to(inputs_embeds.dtype)
        return self.dropout(inputs_embeds)


class ScaledEmbedding(nn.Embedding):
    """An embedding times sqrt(width): scaled inside the module, so that whoever calls it gets what the model reads.

    Only its output is scaled, not the matrix, which an output layer may share.  peft reads `embed_scale`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = math.sqrt(embedding_dim)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.embed_scale


class TokenStem(AddPositions, nn.Module):
    """Token ids (B, L) -> (B, L, D)."""

    input_names = ("input_ids",)
    input_layer = "embed_tokens"

    def __init__(self, config):
        super().__init__()
        embedding_class = ScaledEmbedding if config.scale_embedding else nn.Embedding
        self.embed_tokens = embedding_class(config.vocab_size, config.hidden_size)
        self.build_positions(config, config.max_position_embeddings)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)


class EmbeddingInStem:
    """Gives transformers access to the input layer: the token embedding, or the first layer over other inputs.

    Precedes PreTrainedModel in the bases of a family's root.  A stem names its layer in `input_layer`.
    """

    _no_split_modules: set[str]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StartsAtZero):
            for tensor in (*module.parameters(), *module.buffers()):
                init.zeros_(tensor)

    def init_parallel_plans(self) -> None:
        """The plans of the configuration, for the modules that this model has: an encoder has no cross-attention."""
        super().init_parallel_plans()
        names = {re.sub(r"\d+", "*", name) for name, _ in self.named_modules()}
        for plan in ("_tp_plan", "_fsdp_plan"):
            setattr(self, plan, {name: style for name, style in getattr(self, plan).items() if name in names})

    def post_init(self) -> None:
        super().post_init()
        # accelerate's FSDP refuses a name that this model has no module of.
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = self._no_split_modules & present

    def get_input_embeddings(self) -> nn.Module:
        stem = self.base_model.stem
        return getattr(stem, stem.input_layer)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input layer by `value`, which is used as it is: with scale_embedding it has to scale itself."""
        if self.base_model is not self:
            self.base_model.set_input_embeddings(value)  # an encoder-decoder has two
            return
        if getattr(self.config, "scale_embedding", False) and not hasattr(value, "embed_scale"):
            logger.warning(
                "scale_embedding=True, and the new input embedding does not scale its output; use a ScaledEmbedding"
            )
        setattr(self.stem, self.stem.input_layer, value)


def inputs_of(stem: nn.Module, first: torch.Tensor | None, given: dict, **named) -> dict[str, torch.Tensor | None]:
    """What a stem reads, from `named` or taken out of `given`; `first` is a trunk's first argument, any main input.

    A trunk names its inputs, because torch.export (2.13) makes no dimension of a `**kwargs` dynamic.
    """
    inputs = {name: named[name] if name in named else given.pop(name, None) for name in stem.input_names}
    if inputs[stem.input_names[0]] is None:
        inputs[stem.input_names[0]] = first
    return inputs


def positions_from_mask(attention_mask: torch.Tensor | None, length: int, past: int, device) -> torch.Tensor:
    """Position ids (B or 1, L) of the last `length` tokens: real tokens are counted, padding on either side is not.

    `attention_mask` (B, past + L) holds 1 for real tokens and 0 for padding; anything but a 2-D mask is ignored.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        # `arange(past, past + length)` would give a graph of a static cache a length that depends on data.
        return (past + torch.arange(length, device=device))[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


__all__ = [
    "AddPositions",
    "EmbeddingInStem",
    "ScaledEmbedding",
    "SinusoidalPositions",
    "TokenStem",
    "inputs_of",
    "positions_from_mask",
]
