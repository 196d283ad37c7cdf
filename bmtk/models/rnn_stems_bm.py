"""Stems of a recurrent network: input embeddings.  B rows, L positions, E width.

`read(inputs, attention_mask)` returns embeddings (B, L, E) and their attention mask, (B, L) or None without padding;
`forward` then applies dropout.  There are no position embeddings: a recurrence reads positions in order.
Sources: locked dropout, Gal & Ghahramani 2016, arXiv:1512.05287; word dropout, Merity et al. 2017, sec. 4.3.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .stems_audio_bm import AudioStem
from .stems_series_bm import SeriesStem


class LockedDropout(nn.Module):
    """Dropout of (B, L, D) with one mask for all positions of a row."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)


class WordStem(nn.Module):
    """Token ids (B, L); `embedding_dropout` drops all occurrences of a word in a batch."""

    input_names = ("input_ids",)
    input_layer = "embed_tokens"

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.word_dropout = config.embedding_dropout
        self.dropout = LockedDropout(config.input_dropout)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds = self.embed_tokens(input_ids)
        if not self.training or not self.word_dropout:
            return embeds
        kept = F.dropout(embeds.new_ones(self.embed_tokens.num_embeddings), self.word_dropout)
        return embeds * kept[input_ids][..., None]

    def read(self, inputs: dict, attention_mask):
        return self.embed(inputs["input_ids"]), attention_mask

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.dropout(inputs_embeds)


class RecurrentAudioStem(AudioStem):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = LockedDropout(config.input_dropout)

    def read(self, inputs: dict, attention_mask):
        return self.embed(**inputs, attention_mask=attention_mask)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.dropout(inputs_embeds)


class RecurrentSeriesStem(SeriesStem):
    def __init__(self, config):
        super().__init__(config)
        self.dropout = LockedDropout(config.input_dropout)

    def read(self, inputs: dict, attention_mask):
        return self.embed(**inputs)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.dropout(inputs_embeds)


STEMS = {"tokens": WordStem, "audio": RecurrentAudioStem, "series": RecurrentSeriesStem}

__all__ = ["STEMS", "LockedDropout", "WordStem"]
