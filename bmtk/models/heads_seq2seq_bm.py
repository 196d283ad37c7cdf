"""Sequence to sequence head.  B rows, L target positions, V tokens."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .encoder_decoder_bm import TwoEmbeddings
from .heads_bm import label_loss


class Seq2SeqLMHead(TwoEmbeddings):
    """Predicts the next token of the target.  `trunk_class` returns transformers' Seq2SeqModelOutput.

    The trunk has an `encoder` and a `decoder`, each with its `stem.embed_tokens`; with tie_word_embeddings=True these
    and the output layer share one matrix.
    """

    _tied_weights_keys = {
        "lm_head.weight": "model.encoder.stem.embed_tokens.weight",
        "model.decoder.stem.embed_tokens.weight": "model.encoder.stem.embed_tokens.weight",
    }

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        if not config.is_encoder_decoder:
            raise ValueError(
                f"{type(self).__name__} needs is_encoder_decoder=True: it reads one row and writes another"
            )
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """In one piece: for a `prefill_chunk_size` transformers cuts the source's mask to the length of the target."""
        generation_config = copy.copy(generation_config)
        generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return decoder_input_ids_of(labels, self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Logits (B, L, V); `labels` (B, L) are the target's tokens, -100 where nothing is predicted.

        `labels` are not shifted against the logits; without decoder inputs, the decoder reads `labels` shifted right.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        return Seq2SeqLMOutput(
            loss=None if labels is None else label_loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


def decoder_input_ids_of(labels: torch.Tensor, config) -> torch.Tensor:
    """Decoder inputs for `labels` (B, L): the start token, then all labels but the last."""
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(f"decoder_start_token_id={start} and pad_token_id={pad}: a decoder needs both; set them")
    return F.pad(labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad), (1, 0), value=start)


__all__ = ["Seq2SeqLMHead", "decoder_input_ids_of"]
