"""Recurrent networks.  B rows, L positions, D width, V tokens, S source positions.

Cells (recurrence_bm.py) in stacked, residual and bidirectional layers; the regularizers of AWD-LSTM (Merity
et al. 2017, arXiv:1708.02182): locked dropout (Gal & Ghahramani 2016, arXiv:1512.05287), embedding dropout, weight
drop, activation regularization; encoder-decoder with global attention (Luong et al. 2015, arXiv:1508.04025).
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bm_rnn import BmRnnConfig
from .encoder_decoder_bm import EncoderDecoder, OneOrTwoStacks
from .heads_audio_bm import AudioClassificationHead, CTCHead
from .heads_bm import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .heads_seq2seq_bm import Seq2SeqLMHead
from .heads_series_bm import TimeSeriesPredictionHead
from .pooling_bm import POOLINGS, mask_of_positions
from .recurrence_bm import Documents, GatedProjection, MinGRU, TorchRecurrence
from .recurrent_state_bm import RecurrentState  # noqa: F401  (registers the cache of this family with DynamicCache)
from .rnn_stems_bm import STEMS, LockedDropout
from .stems_bm import EmbeddingInStem, inputs_of

logger = logging.get_logger(__name__)

NORMS = {"none": lambda width: nn.Identity(), "rms_norm": nn.RMSNorm, "layer_norm": nn.LayerNorm}


@dataclass
class BmRnnModelOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """`undropped_hidden_state` (B, L, D): `last_hidden_state` before its dropout; in training only.

    `final_state` (B, sum over layers of U, twice for LSTMs): the state after each row, if requested.
    """

    undropped_hidden_state: torch.Tensor | None = None
    final_state: torch.Tensor | None = None


@dataclass
class BmRnnCausalLMOutput(CausalLMOutputWithPast):
    """`final_state`: as in BmRnnModelOutput."""

    final_state: torch.Tensor | None = None


class BmRnnLayer(GradientCheckpointingLayer):
    """Norm, recurrence, residual sum, locked dropout."""

    def __init__(self, config: BmRnnConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        units = config.layer_sizes[layer_idx]
        input_size = config.layer_sizes[layer_idx - 1] if layer_idx else config.embedding_size
        is_last = layer_idx == config.num_hidden_layers - 1
        self.norm = NORMS[config.norm_type](input_size)
        bidirectional = not config.is_causal
        if config.cell_type == "mingru":
            self.recurrence = MinGRU(input_size, units, bidirectional=bidirectional)
        else:
            self.recurrence = TorchRecurrence(
                config.cell_type, input_size, units, bidirectional=bidirectional, weight_drop=config.weight_drop
            )
        self.is_residual = config.residual and input_size == units
        self.dropout = LockedDropout(0.0 if is_last else config.hidden_dropout)

    def forward(
        self, hidden_states, *state: torch.Tensor, documents: Documents | None = None, past_key_values=None, **kwargs
    ):
        """(B, L, D) -> (B, L, U) and the state after it; `state` is the initial state if the cache is empty.

        A state is passed as two tensors, not as a pair: reentrant checkpointing ignores gradients inside a tuple.
        """
        state = state or None
        if past_key_values is not None:
            state = past_key_values.layers[self.layer_idx].state or state
        mixed, state = self.recurrence(self.norm(hidden_states), state, documents)
        if past_key_values is not None:
            past_key_values.update(*state, self.layer_idx, hidden_states.shape[1])
        if self.is_residual:
            mixed = hidden_states + mixed
        return self.dropout(mixed), *state


def draw_as_nn_lstm(module: nn.RNNBase) -> None:
    """Draw what transformers draws first for every nn.LSTM, so that seeds give the weights that they always gave."""
    if module.mode == "LSTM":
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                nn.init.xavier_uniform_(torch.empty_like(parameter))


class BmRnnPreTrainedModel(EmbeddingInStem, PreTrainedModel):
    config: BmRnnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BmRnnLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # no assisted decoding: a state cannot be rolled back
    _can_record_outputs = {"hidden_states": BmRnnLayer}

    def post_init(self):
        config, output = self.config, self.get_output_embeddings()
        is_tied = output is not None and self._tied_weights_keys and config.tie_word_embeddings
        if is_tied and output.in_features != config.embedding_size:
            raise ValueError(
                f"tie_word_embeddings=True needs embedding_size={config.embedding_size} equal to hidden_size="
                f"{config.hidden_size}; widen the layers by intermediate_size (the last one too, if "
                "output_projection=True), or set tie_word_embeddings=False"
            )
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); input weights Xavier, recurrent weights orthogonal, forget gates open (bias 1)."""
        super()._init_weights(module)
        if isinstance(module, nn.RNNBase):
            draw_as_nn_lstm(module)
            for name, parameter in module.named_parameters():
                blocks = [torch.empty_like(block) for block in parameter.split(module.hidden_size)]  # one per gate
                for block in blocks:
                    if name.startswith("weight_ih"):
                        nn.init.xavier_uniform_(block)
                    elif name.startswith("weight_hh"):
                        nn.init.orthogonal_(block)
                    else:
                        block.zero_()
                if name.startswith("bias_ih") and module.mode == "LSTM":
                    blocks[1].fill_(1.0)  # Jozefowicz et al. 2015; torch's order of gates is i, f, g, o
                init.copy_(parameter, torch.cat(blocks))
        elif isinstance(module, GatedProjection):
            init.xavier_uniform_(module.weight)
            bias = torch.zeros_like(module.bias).unflatten(0, (module.num_directions, 2, -1))
            bias[:, 1] = -1.0  # z = 0.27: keep as much of the state as an LSTM with forget bias 1
            init.copy_(module.bias, bias.flatten())


class BmRnnModel(OneOrTwoStacks, BmRnnPreTrainedModel):
    """Stem, layers, norm, projection; returns `last_hidden_state` (B, L, D) and `pooler_output` (B, D)."""

    returns_state = False

    def __init__(self, config: BmRnnConfig):
        if config.is_encoder_decoder:
            raise ValueError(
                f"is_encoder_decoder=True makes two stacks, and {type(self).__name__} is one; open them by AutoModel "
                "or AutoModelForSeq2SeqLM"
            )
        super().__init__(config)
        self.stem = STEMS[config.input_type](config)
        self.main_input_name = self.stem.input_names[0]
        self.layers = nn.ModuleList(BmRnnLayer(config, i) for i in range(config.num_hidden_layers))
        width = config.layer_sizes[-1]
        self.norm = NORMS[config.norm_type](width)
        self.projection = nn.Linear(width, config.hidden_size) if config.output_projection else nn.Identity()
        self.dropout = LockedDropout(config.output_dropout)
        self.pool = POOLINGS[config.classifier_pooling]
        self.is_causal = config.is_causal
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def encoder_decoder_class(cls) -> type:
        return BmRnnEncoderDecoderModel

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        initial_state: torch.Tensor | None = None,
        output_state: bool | None = None,
        input_features: torch.Tensor | None = None,
        past_values: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BmRnnModelOutput:
        """The state is reset where `position_ids` (B, L) are 0; `initial_state` is an earlier `final_state`.

        `output_state`: whether to return the `final_state`; None: an encoder does, others do not.

        `input_ids` or another main input: input_features or past_values by keyword or in its place (see the stems).
        """
        if token_type_ids is not None:
            logger.warning_once("token_type_ids are ignored: a bm_rnn has no embedding of token types")
        inputs = inputs_of(
            self.stem,
            input_ids,
            kwargs,
            input_features=input_features,
            past_values=past_values,
            past_observed_mask=past_observed_mask,
            past_time_features=past_time_features,
        )
        if (inputs[self.main_input_name] is None) == (inputs_embeds is None):
            raise ValueError(f"pass {self.main_input_name} or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds, attention_mask = self.stem.read(inputs, attention_mask)
        if not self.is_causal:
            past_key_values = (
                None  # the backward direction starts at the end of a row, so no state can be carried over
            )
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        output_state = self.returns_state if output_state is None else output_state
        has_state = initial_state is not None or (past_key_values is not None and past_key_values.get_seq_length() > 0)
        states = {"has_state": has_state, "keeps_state": output_state or past_key_values is not None}
        documents = Documents.find(attention_mask, position_ids, inputs_embeds, **states)
        hidden_states, final_state = self.stem(inputs_embeds), []
        for layer, start in zip(self.layers, self._split_state(initial_state), strict=True):
            hidden_states, *state = layer(
                hidden_states, *start, documents=documents, past_key_values=past_key_values, **kwargs
            )
            final_state += state
        undropped = self.projection(self.norm(hidden_states))
        last_hidden_state = self.dropout(undropped)
        return BmRnnModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pool(last_hidden_state, mask_of_positions(attention_mask, inputs_embeds.shape[1])),
            past_key_values=past_key_values,
            undropped_hidden_state=undropped if self.training else None,
            final_state=torch.cat(final_state, dim=-1) if output_state else None,
        )

    def _split_state(self, state: torch.Tensor | None) -> list[tuple[torch.Tensor, ...]]:
        """The state of each layer, (hidden, cell), from a `final_state`; empty without one."""
        if state is None:
            return [()] * len(self.layers)
        has_cell = self.config.cell_type == "lstm"
        sizes = [size for units in self.config.layer_sizes for size in (units, units if has_cell else 0)]
        if state.shape[-1] != sum(sizes):
            raise ValueError(
                f"initial_state has width {state.shape[-1]}, and the state of this model {sum(sizes)}; pass the "
                "final_state that it returned"
            )
        parts = state.split(sizes, dim=-1)
        return list(zip(parts[::2], parts[1::2], strict=True))


def activation_penalty(config, outputs, labels, attention_mask=None, position_ids=None, num_items_in_batch=None):
    """Activation regularization (AR) and its temporal form (TAR) of `outputs`; `labels` (B, L) are shifted already.

    Merity et al. 2017, sec. 4.6: the mean square of the output after dropout, and of the change of the output before
    dropout from one position to the next, times their factors.  Here they are sums over predicted positions (TAR: that
    continue a document) divided by the same count as the loss, so they are means over the global batch, independent of
    micro-batches, processes and packing.
    """
    predicts = labels != -100
    continues = predicts[:, 1:]
    if attention_mask is not None:
        continues = continues & attention_mask[:, -labels.shape[1] : -1].to(torch.bool)
    if position_ids is not None:
        continues = continues & (position_ids[:, 1:] != 0)
    size = outputs.last_hidden_state.float().pow(2).mean(-1)  # (B, L)
    change = outputs.undropped_hidden_state.float().diff(dim=1).pow(2).mean(-1)  # (B, L - 1)
    penalty = config.activation_regularization * (size * predicts).sum()
    penalty = penalty + config.temporal_activation_regularization * (change * continues).sum()
    return penalty / (predicts.sum() if num_items_in_batch is None else num_items_in_batch)


class BmRnnForCausalLM(CausalLMHead, BmRnnPreTrainedModel, GenerationMixin):
    """Predicts the next token.  In training, `loss` includes the activation penalties; in evaluation it does not.

    With `output_state=True` the output has a `final_state`, which a later call can take as `initial_state`.
    """

    trunk_class = BmRnnModel
    output_class = BmRnnCausalLMOutput
    passed_on = ("final_state",)
    carries_state = True

    def penalty(
        self, outputs, labels, attention_mask, position_ids, shift_labels=None, num_items_in_batch=None, **kwargs
    ):
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        return activation_penalty(self.config, outputs, shifted, attention_mask, position_ids, num_items_in_batch)


class LuongAttention(nn.Module):
    """Global attention: h (B, L, D) over a source (B, S, D) -> tanh(W [context; h]) and weights (B, L, S), eq. 5-8."""

    def __init__(self, config: BmRnnConfig):
        super().__init__()
        width = config.hidden_size
        general = config.attention_scoring == "general"
        # The matrix of "general" scoring is applied to the decoder's side: one product for each step of generation.
        self.query = nn.Linear(width, width, bias=False) if general else nn.Identity()
        self.combine = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, source: torch.Tensor, source_mask: torch.Tensor | None):
        scores = (self.query(hidden_states) @ source.transpose(1, 2)).float()
        if source_mask is not None:
            scores = scores.masked_fill(source_mask[:, None] == 0, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(source.dtype)
        return torch.tanh(self.combine(torch.cat((weights @ source, hidden_states), dim=-1))), weights


class BmRnnEncoder(BmRnnModel):
    """The encoder of an encoder-decoder: also returns `final_state`, the initial state of the decoder."""

    returns_state = True


class BmRnnEncoderDecoderModel(EncoderDecoder, BmRnnPreTrainedModel):
    """An encoder, and a causal decoder that starts from its last state and attends to all of its positions.

    The attention output is not fed into the next input (input feeding, Luong et al., sec. 3.3): then a kernel could
    not process a whole row in one call.
    """

    def __init__(self, config: BmRnnConfig):
        super().__init__(config)
        encoder_config, decoder_config = copy.deepcopy(config), copy.deepcopy(config)
        encoder_config.is_encoder_decoder = decoder_config.is_encoder_decoder = False
        encoder_config.use_cache, decoder_config.is_causal = False, True
        self.encoder = BmRnnEncoder(encoder_config)
        self.decoder = BmRnnModel(decoder_config)
        self.attention = LuongAttention(config)
        self.post_init()

    def decode(self, source, source_mask, *, position_ids, past_key_values, **inputs) -> BmRnnModelOutput:
        """`last_hidden_state` (B, L, D) is the output of the attention; `cross_attentions` (B, 1, L, S)."""
        if position_ids is not None:
            logger.warning_once(
                "decoder_position_ids are ignored: the decoder of a bm_rnn starts from the last state of its encoder"
            )
        is_pair = isinstance(past_key_values, EncoderDecoderCache)  # from generate(); the encoder needs no cache
        decoded = self.decoder(
            past_key_values=past_key_values.self_attention_cache if is_pair else past_key_values,
            initial_state=source.final_state,
            **inputs,
        )
        attended, weights = self.attention(decoded.last_hidden_state, source.last_hidden_state, source_mask)
        return BmRnnModelOutput(
            last_hidden_state=attended,
            past_key_values=past_key_values if is_pair else decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            cross_attentions=(weights[:, None],) if inputs.get("output_attentions") else None,
        )


class BmRnnForSeq2SeqLM(Seq2SeqLMHead, BmRnnPreTrainedModel, GenerationMixin):
    trunk_class = BmRnnEncoderDecoderModel


class BmRnnForMaskedLM(MaskedLMHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


class BmRnnForSequenceClassification(SequenceClassificationHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


class BmRnnForTokenClassification(TokenClassificationHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


class BmRnnForQuestionAnswering(QuestionAnsweringHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


class BmRnnForAudioClassification(AudioClassificationHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


class BmRnnForCTC(CTCHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


class BmRnnForTimeSeriesPrediction(TimeSeriesPredictionHead, BmRnnPreTrainedModel):
    trunk_class = BmRnnModel


__all__ = [
    "BmRnnEncoderDecoderModel",
    "BmRnnForAudioClassification",
    "BmRnnForCTC",
    "BmRnnForCausalLM",
    "BmRnnForMaskedLM",
    "BmRnnForQuestionAnswering",
    "BmRnnForSeq2SeqLM",
    "BmRnnForSequenceClassification",
    "BmRnnForTimeSeriesPrediction",
    "BmRnnForTokenClassification",
    "BmRnnModel",
    "BmRnnPreTrainedModel",
]
