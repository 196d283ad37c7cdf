"""Transformer: attention mixes the positions.  B rows, L positions, S source positions, D width.

The configuration chooses between modern and classic variants: layers in transformer_layers_bm.py, inputs in
stems_bm.py, outputs in heads_*.py.  Encoder (bidirectional), decoder (causal), or both with cross-attention (Vaswani
et al. 2017, arXiv:1706.03762).
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_bm_transformer import BmTransformerConfig
from .encoder_decoder_bm import EncoderDecoder, OneOrTwoStacks
from .heads_audio_bm import AudioClassificationHead, CTCHead
from .heads_bm import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .heads_detection_bm import ObjectDetectionHead
from .heads_image_bm import ImageClassificationHead, MaskedImageModelingHead
from .heads_seq2seq_bm import Seq2SeqLMHead
from .heads_series_bm import TimeSeriesPredictionHead
from .pooling_bm import POOLINGS, mask_of_positions
from .stems_bm import EmbeddingInStem, inputs_of, positions_from_mask
from .transformer_layers_bm import (
    DECODER_LAYERS,
    LAYERS,
    NORMS,
    BmRotaryEmbedding,
    BmTransformerAttention,
    BmTransformerLayer,
    ResidualProjection,
)
from .transformer_stems_bm import STEMS


@dataclass
class BmTransformerOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """`pooler_output` (B, D); `feature_maps` of images: embedded patches and last positions, each (B, D, H, W)."""

    feature_maps: tuple[torch.Tensor, torch.Tensor] | None = None


def same_document_mask(position_ids: torch.Tensor):
    """Mask function for packed rows, whose position_ids (B, L) restart at each document; None without packing.

    transformers' causal mask detects packing itself, its bidirectional mask does not.
    """
    documents = find_packed_sequence_indices(position_ids)
    return None if documents is None else packed_sequence_mask_function(documents)


class BmTransformerPreTrainedModel(EmbeddingInStem, PreTrainedModel):
    config: BmTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PreNormLayer", "PostNormLayer", "PreNormDecoderLayer", "PostNormDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BmTransformerLayer, "attentions": BmTransformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); projections into the residual stream over sqrt(2 layers) (Radford et al. 2019).

        Each layer adds two outputs to the residual stream (attention and MLP); the factor keeps the variance of their
        sum independent of depth.
        """
        super()._init_weights(module)
        if isinstance(module, ResidualProjection):
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5)


class BmTransformerModel(OneOrTwoStacks, BmTransformerPreTrainedModel):
    """Stem, layers, final norm (pre-norm only); returns `last_hidden_state` (B, L, D) and `pooler_output` (B, D)."""

    has_pooler = True  # whether `with_pooler` adds the pooler layer

    def __init__(self, config: BmTransformerConfig):
        super().__init__(config)
        self.check(config)
        self.stem = STEMS[config.input_type](config)
        self.main_input_name = self.stem.input_names[0]
        self.layers = nn.ModuleList(self.build_layers(config))
        pre_norm = config.norm_position == "pre"
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps) if pre_norm else nn.Identity()
        self.rotary_emb = BmRotaryEmbedding(config) if config.position_embedding_type == "rotary" else None
        self.pool = POOLINGS[config.classifier_pooling]
        width, with_pooler = config.hidden_size, config.with_pooler and self.has_pooler
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh()) if with_pooler else nn.Identity()
        if config.input_type == "pixels":
            self.output_stride = config.patch_size
            self.feature_strides, self.feature_channels = [config.patch_size] * 2, [width] * 2
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def encoder_decoder_class(cls) -> type:
        return BmTransformerEncoderDecoderModel

    def check(self, config) -> None:
        if config.is_encoder_decoder:
            raise ValueError(
                f"is_encoder_decoder=True makes two stacks, and {type(self).__name__} is one; open them by AutoModel "
                "or AutoModelForSeq2SeqLM"
            )

    def build_layers(self, config) -> list[nn.Module]:
        layer_class = LAYERS[config.norm_position]
        return [layer_class(config, i, is_causal=config.is_causal) for i in range(config.num_hidden_layers)]

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
        pixel_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        past_values: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BmTransformerOutput:
        """`input_ids` or another main input: pixel_values, input_features, past_values by keyword or in its place."""
        inputs = inputs_of(
            self.stem,
            input_ids,
            kwargs,
            pixel_values=pixel_values,
            input_features=input_features,
            past_values=past_values,
            past_observed_mask=past_observed_mask,
            past_time_features=past_time_features,
        )
        inputs_embeds, attention_mask = self.read(inputs_embeds, attention_mask, inputs)
        same_document = None
        if not self.config.is_causal:
            past_key_values = None  # earlier positions would attend to later ones, so they cannot be cached
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions_from_mask(attention_mask, inputs_embeds.shape[1], past, inputs_embeds.device)
        elif attention_mask is None and not self.config.is_causal:
            same_document = same_document_mask(position_ids.expand(inputs_embeds.shape[0], -1))
        mask = create_causal_mask(  # bidirectional if config.is_causal is False
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=same_document,
        )
        # The empty cache is created after the mask, because transformers detects packing only without a cache.
        if use_cache and past_key_values is None and self.config.is_causal:
            past_key_values = DynamicCache(config=self.config)
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        embedded = self.stem(inputs_embeds, position_ids, **types)
        hidden_states = self.mix(
            embedded, position_ids=position_ids, attention_mask=mask, past_key_values=past_key_values, **kwargs
        )
        pooled = self.pool(hidden_states, mask_of_positions(attention_mask, hidden_states.shape[1]))
        return BmTransformerOutput(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(pooled),
            past_key_values=past_key_values,
            feature_maps=self.feature_maps(inputs.get("pixel_values"), embedded, hidden_states),
        )

    def read(self, inputs_embeds, attention_mask, inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (B, L, D) and their attention mask (B, L)."""
        if (inputs[self.main_input_name] is None) == (inputs_embeds is None):
            raise ValueError(f"pass {self.main_input_name} or inputs_embeds, and not both")
        if inputs_embeds is not None:
            return inputs_embeds, attention_mask
        return self.stem.read(inputs, attention_mask)

    def mix(self, hidden_states: torch.Tensor, *source, position_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, *source, rotary=rotary, position_ids=position_ids, **kwargs)
        return self.norm(hidden_states)

    def feature_maps(self, pixel_values, *positions: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Positions (B, prefix + L, D) of images as maps (B, D, H, W)."""
        if pixel_values is None:
            return None
        rows = pixel_values.shape[-2] // self.output_stride
        grids = [x[:, self.stem.num_prefix_tokens :].transpose(1, 2) for x in positions]
        return tuple(grid.unflatten(2, (rows, -1)) for grid in grids)


class BmTransformerPositions(BmTransformerModel):
    """The model for heads that do not read `pooler_output`: without the pooler layer, which would get no gradient."""

    has_pooler = False


class BmTransformerEncoder(BmTransformerPositions):
    """The encoder of an encoder-decoder: bidirectional."""

    def check(self, config) -> None:
        assert config.is_encoder_decoder
        assert not config.is_causal


class BmTransformerDecoder(BmTransformerPositions):
    """The decoder: a position attends to itself, to earlier ones, and to all of a source (B, S, D)."""

    _can_record_outputs = {
        "hidden_states": BmTransformerLayer,
        "attentions": OutputRecorder(BmTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(BmTransformerAttention, index=1, layer_name="cross_attn"),
    }

    def check(self, config) -> None:
        assert config.is_encoder_decoder
        assert config.is_causal

    def build_layers(self, config) -> list[nn.Module]:
        return [DECODER_LAYERS[config.norm_position](config, i) for i in range(config.decoder_layers)]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "pass labels, decoder_input_ids or decoder_inputs_embeds: a decoder reads what it has written"
            )
        x, attention_mask = self.read(inputs_embeds, attention_mask, {"input_ids": input_ids})
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        own_cache = None if past_key_values is None else past_key_values.self_attention_cache
        if position_ids is None:
            past = 0 if own_cache is None else own_cache.get_seq_length()
            position_ids = positions_from_mask(attention_mask, x.shape[1], past, x.device)
        mask = create_causal_mask(self.config, x, attention_mask, own_cache, position_ids)
        source_mask = create_bidirectional_mask(self.config, x, encoder_attention_mask, encoder_hidden_states)
        hidden_states = self.mix(
            self.stem(x, position_ids),
            encoder_hidden_states,
            position_ids=position_ids,
            attention_mask=mask,
            source_mask=source_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )


class BmTransformerEncoderDecoderModel(EncoderDecoder, BmTransformerPreTrainedModel):
    """An encoder for the source, and a decoder that attends to its output."""

    def __init__(self, config: BmTransformerConfig):
        super().__init__(config)
        encoder_config = copy.deepcopy(config)
        encoder_config.is_causal = False
        self.encoder = BmTransformerEncoder(encoder_config)
        self.decoder = BmTransformerDecoder(config)
        self.post_init()

    def decode(self, source, source_mask, **inputs) -> BaseModelOutputWithPoolingAndCrossAttentions:
        return self.decoder(
            encoder_hidden_states=source.last_hidden_state, encoder_attention_mask=source_mask, **inputs
        )


class BmTransformerForCausalLM(CausalLMHead, BmTransformerPreTrainedModel, GenerationMixin):
    trunk_class = BmTransformerPositions


class BmTransformerForMaskedLM(MaskedLMHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


class BmTransformerForSeq2SeqLM(Seq2SeqLMHead, BmTransformerPreTrainedModel, GenerationMixin):
    trunk_class = BmTransformerEncoderDecoderModel


class BmTransformerForSequenceClassification(SequenceClassificationHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerModel


class BmTransformerForTokenClassification(TokenClassificationHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


class BmTransformerForQuestionAnswering(QuestionAnsweringHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


class BmTransformerForImageClassification(ImageClassificationHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerModel


class BmTransformerForMaskedImageModeling(MaskedImageModelingHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


class BmTransformerForObjectDetection(ObjectDetectionHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


class BmTransformerForAudioClassification(AudioClassificationHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerModel


class BmTransformerForCTC(CTCHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


class BmTransformerForTimeSeriesPrediction(TimeSeriesPredictionHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerPositions


__all__ = [
    "BmTransformerEncoderDecoderModel",
    "BmTransformerForAudioClassification",
    "BmTransformerForCTC",
    "BmTransformerForCausalLM",
    "BmTransformerForImageClassification",
    "BmTransformerForMaskedImageModeling",
    "BmTransformerForMaskedLM",
    "BmTransformerForObjectDetection",
    "BmTransformerForQuestionAnswering",
    "BmTransformerForSeq2SeqLM",
    "BmTransformerForSequenceClassification",
    "BmTransformerForTimeSeriesPrediction",
    "BmTransformerForTokenClassification",
    "BmTransformerModel",
    "BmTransformerPreTrainedModel",
]
