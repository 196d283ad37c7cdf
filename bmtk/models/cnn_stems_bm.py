"""Stems of a CNN over sequences: input and optional position embeddings.  B rows, L positions.

`read(inputs, attention_mask)` returns embeddings (B, L, D) and their attention mask, (B, L) or None without padding;
`forward` then adds position embeddings.  The stem of images is PixelStem.
"""

import torch
from torch import nn
from transformers.utils import logging

from .stems_audio_bm import AudioStem
from .stems_bm import AddPositions, TokenStem
from .stems_image_bm import PixelStem
from .stems_series_bm import SeriesStem
from .zero_start_bm import ZeroEmbedding

logger = logging.get_logger(__name__)


class ConvolutionalPositions(AddPositions):
    """Learned positions start at 0: filters know which position follows which, so where it matters is learned."""

    positions_class = ZeroEmbedding


class ConvolutionalTokenStem(ConvolutionalPositions, TokenStem):
    def read(self, inputs: dict, attention_mask):
        return self.embed(inputs["input_ids"]), attention_mask


class ConvolutionalAudioStem(ConvolutionalPositions, AudioStem):
    def __init__(self, config):
        super().__init__(config)
        self.build_positions(config, config.max_position_embeddings)

    def read(self, inputs: dict, attention_mask):
        return self.embed(**inputs, attention_mask=attention_mask)


class ConvolutionalSeriesStem(ConvolutionalPositions, SeriesStem):
    def __init__(self, config):
        super().__init__(config)
        self.build_positions(config, self.num_positions)

    def read(self, inputs: dict, attention_mask):
        return self.embed(**inputs)


STEMS: dict[str, type[nn.Module]] = {
    "pixels": PixelStem,
    "tokens": ConvolutionalTokenStem,
    "audio": ConvolutionalAudioStem,
    "series": ConvolutionalSeriesStem,
}


def warn_of_token_types(token_type_ids: torch.Tensor | None) -> None:
    if token_type_ids is not None:
        logger.warning_once("token_type_ids are ignored: a bm_cnn has no embedding of token types")


__all__ = ["STEMS", "warn_of_token_types"]
