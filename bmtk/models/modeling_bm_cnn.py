"""Convolutional networks.  B rows, L positions, D width; of images C channels, H x W.

Images (image_blocks_bm.py): plain, residual basic, bottleneck and ConvNeXt blocks in stages.  Sequences
(convolutions_bm.py): filters of several widths, residual and gated dilated stacks, causal or not.  These files name
the sources.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cnn_stems_bm import STEMS, warn_of_token_types
from .configuration_bm_cnn import BmCnnConfig
from .convolutions_bm import CLOSINGS, LAYERS, Convolution
from .heads_audio_bm import AudioClassificationHead, CTCHead
from .heads_bm import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    check_input,
)
from .heads_detection_bm import ObjectDetectionHead
from .heads_image_bm import (
    FullyConnectedClassifier,
    ImageClassificationHead,
    MaskedImageModelingHead,
)
from .heads_series_bm import TimeSeriesPredictionHead
from .image_blocks_bm import ConvNextBlock, build_norm, build_stages
from .kaiming_bm import KaimingLinear
from .pooling_bm import POOLINGS, mask_of_positions
from .stems_bm import EmbeddingInStem, inputs_of, positions_from_mask
from .trunk_layer_bm import TrunkLayer


@dataclass
class BmCnnOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """`last_hidden_state` (B, L, D), of images the last map, row by row; `pooler_output` (B, D), of images
    (B, D * grid^2): the input of classifiers; `feature_maps` of images: of the stem and of every stage, (B, C, H, W)
    each."""

    feature_maps: tuple | None = None


class BmCnnPreTrainedModel(EmbeddingInStem, PreTrainedModel):
    config: BmCnnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ImageStage", "ResidualConvolutionLayer", "GatedConvolutionLayer", "MultiWidthLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # no assisted decoding: the state of a convolution cannot be rolled back
    _can_record_outputs = {"hidden_states": TrunkLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Convolutions and hidden classifier layers Kaiming (He et al. 2015, arXiv:1502.01852), others N(0, range)."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, KaimingLinear):
            init.normal_(module.weight, std=module.std)
        elif isinstance(module, Convolution):
            init.zeros_(module.bias)
        elif isinstance(module, ConvNextBlock):
            init.constant_(module.layer_scale, self.config.layer_scale_init_value)


class BmCnnModel(BmCnnPreTrainedModel):
    """Stem, stages or layers, and for ConvNeXt and sequences a final norm; `pooler_output` is read by classifiers."""

    has_pooled_norm = True  # ConvNeXt has a norm after the pooling

    def __init__(self, config: BmCnnConfig):
        super().__init__(config)
        self.stem = STEMS[config.input_type](config)
        self.main_input_name = self.stem.input_names[0]
        if config.input_type == "pixels":
            self.stages = build_stages(config)
            self.pool = nn.AdaptiveAvgPool2d(config.pooled_grid)
            # ConvNeXt normalizes its residual stream nowhere else.
            closes = config.block_type == "convnext" and self.has_pooled_norm
            self.norm = build_norm(config, config.hidden_size) if closes else nn.Identity()
            self.feature_strides = config.stage_strides
            self.feature_channels = [config.stem_width, *config.hidden_sizes]
            self.output_stride = self.feature_strides[-1]
        else:
            self.layers = nn.ModuleList(LAYERS[config.block_type](config, i) for i in range(config.num_hidden_layers))
            self.closing = CLOSINGS[config.block_type](config)
            self.pool = POOLINGS[config.classifier_pooling]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
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
    ) -> BmCnnOutput:
        """`input_ids` (B, L) or `inputs_embeds` (B, L, D); any other main input by keyword or in place of `input_ids`:
        `pixel_values` (B, C, H, W), `input_features`, `past_values` (see the stems).

        `attention_mask` (B, past + L) is 0 at padding; `position_ids` (B, L) restart at the first position of each
        document of a packed row.
        """
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
        if self.config.input_type == "pixels":
            if inputs["pixel_values"] is None:
                raise ValueError("pass pixel_values: this bm_cnn has input_type='pixels'")
            return self.forward_image(**inputs)
        if (inputs[self.main_input_name] is None) == (inputs_embeds is None):
            raise ValueError(
                f"pass {self.main_input_name} or inputs_embeds, and not both: this bm_cnn has input_type="
                f"{self.config.input_type!r}"
            )
        warn_of_token_types(token_type_ids)
        if inputs_embeds is None:
            inputs_embeds, attention_mask = self.stem.read(inputs, attention_mask)
        return self.forward_sequence(inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)

    def forward_image(self, pixel_values, bool_masked_pos=None, mask_token=None) -> BmCnnOutput:
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), pixel_values.dtype)
        maps = [self.stem(pixel_values.to(dtype), bool_masked_pos, mask_token)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return BmCnnOutput(
            last_hidden_state=maps[-1].flatten(2).transpose(1, 2),
            pooler_output=self.norm(self.pool(maps[-1])).flatten(1),
            feature_maps=tuple(maps),
        )

    def forward_sequence(self, x, attention_mask, position_ids, past_key_values, use_cache) -> BmCnnOutput:
        if not self.config.is_causal:
            past_key_values = None  # earlier outputs depend on later positions, so they cannot be cached
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past, length = (0 if past_key_values is None else past_key_values.get_seq_length()), x.shape[1]
        places = positions_from_mask(attention_mask, length, past, x.device) if position_ids is None else position_ids
        mask = mask_of_positions(attention_mask, length)
        real = None if mask is None else mask[..., None].to(x.dtype)  # (B, L, 1)
        x, skips = self.stem(x, places), None
        for layer in self.layers:
            x, skips = layer(x, skips, position_ids=position_ids, mask=real, past_key_values=past_key_values)
        x = self.closing(x, skips)
        return BmCnnOutput(last_hidden_state=x, pooler_output=self.pool(x, mask), past_key_values=past_key_values)


class BmCnnMaps(BmCnnModel):
    """The model for heads that read maps, without the norm after the pooling, which would get no gradient."""

    has_pooled_norm = False


class BmCnnBackbone(BackboneMixin, BmCnnPreTrainedModel):
    """Feature maps of the stages in `out_features`, for models with a backbone."""

    has_attentions = False
    main_input_name = "pixel_values"

    def __init__(self, config: BmCnnConfig):
        check_input(config, type(self).__name__, "pixels")
        super().__init__(config)
        self.model = BmCnnMaps(config)
        self.num_features = self.model.feature_channels
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        outputs = self.model(pixel_values, **kwargs)
        named = zip(self.stage_names, outputs.feature_maps, strict=True)
        maps = tuple(x for name, x in named if name in self.out_features)
        return BackboneOutput(feature_maps=maps, hidden_states=outputs.feature_maps)


class BmCnnForImageClassification(ImageClassificationHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel
    classifier_class = FullyConnectedClassifier


class BmCnnForMaskedImageModeling(MaskedImageModelingHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnMaps


class BmCnnForObjectDetection(ObjectDetectionHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnMaps


class BmCnnForCausalLM(CausalLMHead, BmCnnPreTrainedModel, GenerationMixin):
    trunk_class = BmCnnModel


class BmCnnForMaskedLM(MaskedLMHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


class BmCnnForSequenceClassification(SequenceClassificationHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


class BmCnnForTokenClassification(TokenClassificationHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


class BmCnnForQuestionAnswering(QuestionAnsweringHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


class BmCnnForAudioClassification(AudioClassificationHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


class BmCnnForCTC(CTCHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


class BmCnnForTimeSeriesPrediction(TimeSeriesPredictionHead, BmCnnPreTrainedModel):
    trunk_class = BmCnnModel


__all__ = [
    "BmCnnBackbone",
    "BmCnnForAudioClassification",
    "BmCnnForCTC",
    "BmCnnForCausalLM",
    "BmCnnForImageClassification",
    "BmCnnForMaskedImageModeling",
    "BmCnnForMaskedLM",
    "BmCnnForObjectDetection",
    "BmCnnForQuestionAnswering",
    "BmCnnForSequenceClassification",
    "BmCnnForTimeSeriesPrediction",
    "BmCnnForTokenClassification",
    "BmCnnModel",
    "BmCnnPreTrainedModel",
]
