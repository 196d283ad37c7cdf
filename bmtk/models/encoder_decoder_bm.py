"""Encoder-decoder: the encoder reads a source, the decoder predicts a target.  B rows, L target positions, D width."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple


class EncoderDecoder:
    """Base of encoder-decoders.  A family builds `encoder` and `decoder`, each with its own `stem.embed_tokens`.

    Its `decode(source, source_mask, **inputs)` calls the decoder with `inputs` and with the parts of `source`, the
    encoder's output, that it needs.
    """

    @property
    def stem(self) -> nn.Module:
        return self.encoder.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        if not self.config.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=False gives source and target an embedding each; set "
                "model.encoder.stem.embed_tokens and model.decoder.stem.embed_tokens yourself"
            )
        self.encoder.stem.embed_tokens = self.decoder.stem.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """`last_hidden_state` (B, L, D) is the target's; `attention_mask` is the source's."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                use_cache=False,
                **kwargs,
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:1])
        decoded = self.decode(
            encoder_outputs,
            attention_mask,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


__all__ = ["EncoderDecoder"]
