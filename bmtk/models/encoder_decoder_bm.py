"""Encoder-decoder: the encoder reads a source, the decoder predicts a target.  B rows, L target positions, D width."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple


class TwoEmbeddings:
    """Resizes the embedding of the target too, where it is not the source's (tie_word_embeddings=False)."""

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        source = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if not self.config.tie_word_embeddings:
            decoder = self.base_model.decoder
            old = decoder.get_input_embeddings()
            new = self._get_resized_embeddings(old, source.num_embeddings, mean_resizing=mean_resizing)
            decoder.set_input_embeddings(new.requires_grad_(old.weight.requires_grad))
        return source


class EncoderDecoder(TwoEmbeddings):
    """Base of encoder-decoders.  A family builds `encoder` and `decoder`, each with its own `stem.embed_tokens`.

    Its `decode(source, source_mask, **inputs)` calls the decoder with `inputs` and with the parts of `source`, the
    encoder's output, that it needs.
    """

    _tied_weights_keys = {"decoder.stem.embed_tokens.weight": "encoder.stem.embed_tokens.weight"}
    _auto_class = "AutoModel"  # its code is saved with it, although AutoModel names the class of one stack

    @property
    def stem(self) -> nn.Module:
        return self.encoder.stem

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the embedding of the source; with tie_word_embeddings=True the target's too, which is the same.

        The other embedding of an untied model is that of `decoder`, which has this method as well.
        """
        self.encoder.set_input_embeddings(value)
        if self.config.tie_word_embeddings:
            self.decoder.set_input_embeddings(value)

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
        position_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """`last_hidden_state` (B, L, D) is the target's; `attention_mask` and `position_ids` are the source's."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
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


class OneOrTwoStacks:
    """Base of a family's trunk: AutoModel knows one class for each configuration class, and an encoder-decoder is two.

    `encoder_decoder_class()` returns the class that is opened instead for `is_encoder_decoder=True`.
    """

    @classmethod
    def _from_config(cls, config, **kwargs):
        if config.is_encoder_decoder:
            return cls.encoder_decoder_class()._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        opened = super()
        if getattr(config, "is_encoder_decoder", False):
            opened = cls.encoder_decoder_class()
        return opened.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)


__all__ = ["EncoderDecoder", "OneOrTwoStacks", "TwoEmbeddings"]
