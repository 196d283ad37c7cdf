"""Stems of a Transformer: input and position embeddings.  B rows, L positions, D width.

`read(inputs, attention_mask)` returns embeddings (B, L, D) and their attention mask, (B, L) or None without padding;
`forward` then adds position embeddings.
"""

import torch
from torch import nn
from transformers.utils import logging

from .stems_audio_bm import AudioStem
from .stems_bm import AddPositions, TokenStem
from .stems_image_bm import PatchStem
from .stems_series_bm import SeriesStem

logger = logging.get_logger(__name__)


class TypedTokenStem(TokenStem):
    """Token ids (B, L); `type_vocab_size` adds token types (B, L), `embedding_norm` a norm on the sum."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_types = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if config.embedding_norm else nn.Identity()

    def read(self, inputs: dict, attention_mask):
        return self.embed(inputs["input_ids"]), attention_mask

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_type_ids=None) -> torch.Tensor:
        if self.embed_types is not None:
            token_type_ids = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            inputs_embeds = inputs_embeds + self.embed_types(token_type_ids)
        elif token_type_ids is not None:
            logger.warning_once("token_type_ids are ignored: this model has type_vocab_size=0")
        if self.embed_positions is not None:
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids).to(inputs_embeds.dtype)
        return self.dropout(self.norm(inputs_embeds))


class PositionedAudioStem(AddPositions, AudioStem):
    def __init__(self, config):
        super().__init__(config)
        self.build_positions(config, config.max_position_embeddings)

    def read(self, inputs: dict, attention_mask):
        return self.embed(**inputs, attention_mask=attention_mask)


class PositionedSeriesStem(AddPositions, SeriesStem):
    def __init__(self, config):
        super().__init__(config)
        self.build_positions(config, self.num_positions)

    def read(self, inputs: dict, attention_mask):
        return self.embed(**inputs)


class ImageStem(PatchStem):
    """Adds positions in `read` already, because masked patches are replaced before positions are added."""

    input_names = ("pixel_values", "bool_masked_pos", "mask_token")

    def read(self, inputs: dict, attention_mask):
        return super().forward(**inputs), None

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return inputs_embeds


STEMS = {
    "tokens": TypedTokenStem,
    "pixels": ImageStem,
    "audio": PositionedAudioStem,
    "series": PositionedSeriesStem,
}

__all__ = ["STEMS"]
