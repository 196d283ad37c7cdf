"""Every field of every configuration class turned to another value, and what must change with it."""

import dataclasses
import inspect
import typing
from typing import Any

from model_cases import AUDIO, CONVNEXT, CONVOLUTIONAL, DETECTION, MODERN, RECURRENT, STAGES, VOCAB
from transformers import PreTrainedConfig

from bmtk.models.configuration_bm_cnn import BmCnnConfig
from bmtk.models.configuration_bm_rnn import BmRnnConfig
from bmtk.models.configuration_bm_transformer import BmTransformerConfig


@dataclasses.dataclass(frozen=True)
class Turn:
    """Another value of a config field, and what must change with it.

    `effect`: "shapes" of the parameters; "buffers" (equal outputs, other shapes of buffers); "weights" (equal shapes,
    other initial values); "outputs" (equal weights, other outputs in eval mode); "training" (equal outputs in eval
    mode, others in train mode); "loss" (equal outputs, another loss); "gradients" (equal outputs, other gradients);
    "penalty" (an equal loss in eval mode, another in train mode); "cache"; "tie"; "generation" (other
    generated tokens); "serves" (without it, the head refuses); "processor" (what makes pixels of pictures); "times"
    (of what pipelines transcribe).
    `choices`: the values of a Literal that go with `base`; None: all.
    """

    value: Any
    effect: str
    head: str = "CausalLM"
    base: dict[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple | None = None


@dataclasses.dataclass(frozen=True)
class Turns:
    """Of one configuration class: where every turn starts from, and one turn or more for every field."""

    base: dict[str, Any]
    of: dict[str, Turn | tuple[Turn, ...]]


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Field name -> annotation of what the class itself declares, without what it inherits."""
    annotations = inspect.get_annotations(config_class)
    return {name: kind for name, kind in annotations.items() if typing.get_origin(kind) is not typing.ClassVar}


SHORT_SERIES = {"input_type": "series", "context_length": 12, "prediction_length": 5, "patch_size": 3}
QUANTILES = {**SHORT_SERIES, "series_loss": "quantile"}
TRANSLATION_TO_END = {"is_encoder_decoder": True, "decoder_start_token_id": 1, "eos_token_id": 2}
PATCHES = {"input_type": "pixels", "image_size": 16, "patch_size": 4, "position_embedding_type": "learned",
           "fpn_size": 48, "num_detection_layers": 1, "num_feature_levels": 3}  # fmt: skip
NO_TOKENS = {"is_causal": False}
PIXELS = {**STAGES, **DETECTION, "input_type": "pixels", "hidden_size": None, "num_hidden_layers": None}
CONV_STEM = {**PIXELS, "stem_type": "conv", "stem_width": 8}
PLAIN = {**PIXELS, "block_type": "plain"}
CONVNEXT_PIXELS = {**PIXELS, **CONVNEXT}
WIDTHS = {"block_type": "multi_width"}
NGRAMS = {"ngram_buckets": 32}
MANY_ENDS = list(range(2, VOCAB, 2))

TURNS = {
    BmTransformerConfig: Turns({**MODERN, "hidden_act": "gelu", "initializer_range": 0.5}, {
        "vocab_size": Turn(70, "shapes"),
        "hidden_size": Turn(40, "shapes"),
        "num_hidden_layers": Turn(3, "shapes"),
        "num_attention_heads": Turn(8, "outputs"),
        "num_key_value_heads": Turn(1, "shapes"),
        "head_dim": Turn(16, "shapes"),
        "intermediate_size": Turn(24, "shapes"),
        "hidden_act": Turn("relu", "outputs"),
        "position_embedding_type": Turn("learned", "shapes"),
        "max_position_embeddings": Turn(32, "shapes", base={"position_embedding_type": "learned"}),
        "rope_theta": Turn(100.0, "outputs"),
        "rope_parameters": Turn({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, "outputs"),
        "norm_type": Turn("layer_norm", "shapes"),
        "norm_position": Turn("post", "shapes"),
        "norm_eps": Turn(0.1, "outputs"),
        "qk_norm": Turn(True, "shapes"),
        "attention_bias": Turn(True, "shapes"),
        "mlp_bias": Turn(True, "shapes"),
        "is_causal": Turn(False, "outputs", head="Model"),
        "scale_embedding": Turn(True, "outputs", base={"position_embedding_type": "sinusoidal"}),
        "tie_word_embeddings": Turn(False, "tie"),
        "embedding_dropout": Turn(0.3, "training"),
        "hidden_dropout": Turn(0.3, "training"),
        "attention_dropout": Turn(0.3, "training"),
        "classifier_dropout": Turn(0.3, "training", head="SequenceClassification"),
        "classifier_pooling": Turn("mean", "outputs", head="SequenceClassification"),
        "ngram_buckets": Turn(64, "shapes", head="SequenceClassification", base=NGRAMS),
        "ngram_sizes": Turn([1, 3], "gradients", head="SequenceClassification", base=NGRAMS),
        "ngram_skip": Turn(2, "gradients", head="SequenceClassification", base=NGRAMS),
        "ngram_spelling": Turn(4, "buffers", head="SequenceClassification", base=NGRAMS),
        "initializer_range": Turn(0.1, "weights"),
        "use_cache": Turn(False, "cache"),
        "pad_token_id": Turn(5, "generation", base={"eos_token_id": list(range(2, VOCAB, 2))}),
        "bos_token_id": Turn(7, "generation"),
        "eos_token_id": Turn(list(range(2, VOCAB)), "generation"),
        "input_type": Turn("series", "shapes", head="Model", base={"is_causal": False, "image_size": 16}),
        "type_vocab_size": Turn(2, "shapes"),
        "embedding_norm": Turn(True, "shapes"),
        "with_pooler": Turn(True, "shapes", head="SequenceClassification"),
        "is_encoder_decoder": Turn(True, "serves", head="Seq2SeqLM"),
        "decoder_layers": Turn(3, "shapes", head="Seq2SeqLM", base=TRANSLATION_TO_END),
        "decoder_start_token_id": Turn(7, "generation", head="Seq2SeqLM", base=TRANSLATION_TO_END),
        "num_channels": Turn(1, "shapes", head="ImageClassification", base=PATCHES),
        "image_size": Turn(20, "shapes", head="ImageClassification", base=PATCHES),
        "patch_size": Turn(8, "shapes", head="ImageClassification", base=PATCHES),
        "fpn_size": Turn(96, "shapes", head="ObjectDetection", base=PATCHES),
        "num_feature_levels": Turn(2, "shapes", head="ObjectDetection", base=PATCHES),
        "num_detection_layers": Turn(2, "shapes", head="ObjectDetection", base=PATCHES),
        "center_sampling_radius": Turn(0.5, "loss", head="ObjectDetection", base=PATCHES),
        "box_loss": Turn("iou", "loss", head="ObjectDetection", base=PATCHES),
        "focal_alpha": Turn(0.5, "loss", head="ObjectDetection", base=PATCHES),
        "focal_gamma": Turn(1.0, "loss", head="ObjectDetection", base=PATCHES),
        "num_mel_bins": Turn(10, "shapes", head="AudioClassification", base=AUDIO),
        "hop_length": Turn(80, "times", head="CTC", base=AUDIO),
        "context_length": Turn(
            15, "shapes", head="TimeSeriesPrediction", base={**SHORT_SERIES, "position_embedding_type": "learned"}
        ),
        "prediction_length": Turn(6, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "num_input_channels": Turn(2, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "num_time_features": Turn(2, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "series_loss": Turn("mae", "loss", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "linear_forecast": Turn(True, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "quantiles": Turn(
            [0.2, 0.5], "shapes", head="TimeSeriesPrediction", base={**SHORT_SERIES, "series_loss": "quantile"}
        ),
    }),
    BmRnnConfig: Turns({**RECURRENT, "initializer_range": 0.5}, {
        "input_type": Turn("series", "shapes", head="Model", base=NO_TOKENS),
        "vocab_size": Turn(70, "shapes"),
        "embedding_size": Turn(24, "shapes", base={"tie_word_embeddings": False}),
        "hidden_size": Turn(40, "shapes"),
        "intermediate_size": Turn(24, "shapes"),
        "num_hidden_layers": Turn(3, "shapes"),
        "cell_type": Turn("gru", "shapes"),
        "is_causal": Turn(False, "shapes", head="Model"),
        "residual": Turn(True, "outputs"),
        "norm_type": Turn("rms_norm", "shapes"),
        "output_projection": Turn(True, "shapes"),
        "tie_word_embeddings": Turn(False, "tie"),
        "embedding_dropout": Turn(0.3, "training"),
        "input_dropout": Turn(0.3, "training"),
        "hidden_dropout": Turn(0.3, "training"),
        "output_dropout": Turn(0.3, "training"),
        "weight_drop": Turn(0.3, "training"),
        "activation_regularization": Turn(2.0, "penalty"),
        "temporal_activation_regularization": Turn(1.0, "penalty"),
        "attention_scoring": Turn("dot", "shapes", head="Seq2SeqLM", base=TRANSLATION_TO_END),
        "classifier_dropout": Turn(0.3, "training", head="SequenceClassification"),
        "classifier_pooling": Turn("mean", "outputs", head="SequenceClassification"),
        "ngram_buckets": Turn(64, "shapes", head="SequenceClassification", base=NGRAMS),
        "ngram_sizes": Turn([1, 3], "gradients", head="SequenceClassification", base=NGRAMS),
        "ngram_skip": Turn(2, "gradients", head="SequenceClassification", base=NGRAMS),
        "ngram_spelling": Turn(4, "buffers", head="SequenceClassification", base=NGRAMS),
        "initializer_range": Turn(0.1, "weights"),
        "use_cache": Turn(False, "cache"),
        "is_encoder_decoder": Turn(True, "serves", head="Seq2SeqLM"),
        "pad_token_id": Turn(5, "generation", base={"eos_token_id": MANY_ENDS}),
        "bos_token_id": Turn(7, "generation"),
        "eos_token_id": Turn(list(range(2, VOCAB)), "generation"),
        "decoder_start_token_id": Turn(7, "generation", head="Seq2SeqLM", base=TRANSLATION_TO_END),
        "num_mel_bins": Turn(10, "shapes", head="AudioClassification", base=AUDIO),
        "hop_length": Turn(80, "times", head="CTC", base=AUDIO),
        "context_length": Turn(15, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "prediction_length": Turn(6, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "patch_size": Turn(6, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "num_input_channels": Turn(2, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "num_time_features": Turn(2, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "series_loss": Turn("mae", "loss", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "linear_forecast": Turn(True, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "quantiles": Turn([0.2, 0.5], "shapes", head="TimeSeriesPrediction", base=QUANTILES),
    }),
    BmCnnConfig: Turns({**CONVOLUTIONAL, "initializer_range": 0.5}, {
        "input_type": Turn("audio", "shapes", head="Model",
                           base={**STAGES, "hidden_size": None, "num_hidden_layers": None}),
        "block_type": (
            Turn("bottleneck", "shapes", head="ImageClassification", base=PIXELS,
                 choices=("plain", "basic", "bottleneck", "convnext")),
            Turn("gated", "shapes", choices=("residual", "gated", "multi_width"), base={"is_causal": True}),
        ),
        "hidden_act": Turn("silu", "outputs", head="ImageClassification", base=PIXELS),
        "norm_type": Turn("layer_norm", "shapes", head="ImageClassification", base=PIXELS),
        "norm_eps": Turn(0.5, "outputs", head="ImageClassification", base=PIXELS),
        "hidden_size": Turn(32, "shapes"),
        "num_hidden_layers": Turn(4, "shapes"),
        "num_channels": Turn(1, "shapes", head="ImageClassification", base=PIXELS),
        "image_size": Turn(20, "processor", head="ImageClassification", base=PIXELS),
        "stem_type": Turn("patch", "shapes", head="ImageClassification", base=PIXELS),
        "stem_width": Turn(4, "shapes", head="ImageClassification", base=CONV_STEM),
        "stem_kernel_size": Turn(5, "shapes", head="ImageClassification", base=CONV_STEM),
        "stem_stride": Turn(1, "outputs", head="ImageClassification", base=CONV_STEM),
        "stem_pooling": Turn(False, "outputs", head="ImageClassification", base=CONV_STEM),
        "stem_pools_first": Turn(True, "shapes", head="ImageClassification", base=CONV_STEM),  # the norm's name is new
        "patch_size": (
            Turn(4, "shapes", head="ImageClassification", base=CONVNEXT_PIXELS),
            Turn(6, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        ),
        "hidden_sizes": Turn([8, 24], "shapes", head="ImageClassification", base=PIXELS),
        "depths": Turn([2, 2], "shapes", head="ImageClassification", base=PIXELS),
        "kernel_sizes": Turn([5, 5], "shapes", head="ImageClassification", base=PIXELS),
        "paddings": Turn([0, 0], "outputs", head="ImageClassification", base=PLAIN),
        "strides": Turn([1, 1], "outputs", head="ImageClassification", base=PIXELS),
        "pool_sizes": Turn([3, 2], "outputs", head="ImageClassification", base=PLAIN),
        "pool_stride": Turn(1, "outputs", head="ImageClassification", base=PLAIN),
        # A maximum is the same before ReLU and after it; an average is not.
        "pools_first": Turn(True, "outputs", head="ImageClassification", base={**PLAIN, "pooling_type": "avg"}),
        "pooling_type": Turn("avg", "outputs", head="ImageClassification", base=PLAIN),
        "expansion": Turn(2, "shapes", head="ImageClassification", base=CONVNEXT_PIXELS),
        "downsample_in_bottleneck": Turn(True, "outputs", head="ImageClassification",
                                         base={**PIXELS, "block_type": "bottleneck"}),
        "layer_scale_init_value": Turn(0.1, "weights", head="ImageClassification", base=CONVNEXT_PIXELS),
        "drop_path_rate": Turn(0.9, "training", head="ImageClassification",
                               base={**PIXELS, "norm_type": "layer_norm"}),
        "pooled_grid": Turn(2, "shapes", head="ImageClassification", base=PIXELS),
        "classifier_hidden_sizes": Turn([5], "shapes", head="ImageClassification", base=PIXELS),
        "fpn_size": Turn(32, "shapes", head="ObjectDetection", base=PIXELS),
        "num_feature_levels": Turn(2, "shapes", head="ObjectDetection", base=PIXELS),
        "num_detection_layers": Turn(2, "shapes", head="ObjectDetection", base=PIXELS),
        "center_sampling_radius": Turn(0.5, "loss", head="ObjectDetection", base=PIXELS),
        "box_loss": Turn("iou", "loss", head="ObjectDetection", base=PIXELS),
        "focal_alpha": Turn(0.5, "loss", head="ObjectDetection", base=PIXELS),
        "focal_gamma": Turn(1.0, "loss", head="ObjectDetection", base=PIXELS),
        "vocab_size": Turn(70, "shapes"),
        "kernel_size": Turn(2, "shapes"),
        "dilation_cycle": Turn(1, "outputs"),
        "filter_widths": Turn([2, 3], "shapes", head="SequenceClassification", base=WIDTHS),
        "is_causal": Turn(False, "outputs", head="Model"),
        "position_embedding_type": Turn("learned", "shapes"),
        "max_position_embeddings": Turn(32, "shapes", base={"position_embedding_type": "learned"}),
        "embedding_dropout": Turn(0.3, "training"),
        "hidden_dropout": Turn(0.3, "training"),
        "tie_word_embeddings": Turn(False, "tie"),
        "num_mel_bins": Turn(10, "shapes", head="AudioClassification", base=AUDIO),
        "hop_length": Turn(80, "times", head="CTC", base=AUDIO),
        "context_length": Turn(15, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "prediction_length": Turn(6, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "num_input_channels": Turn(2, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "num_time_features": Turn(2, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "series_loss": Turn("mae", "loss", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "linear_forecast": Turn(True, "shapes", head="TimeSeriesPrediction", base=SHORT_SERIES),
        "quantiles": Turn([0.2, 0.5], "shapes", head="TimeSeriesPrediction", base=QUANTILES),
        "use_cache": Turn(False, "cache"),
        "pad_token_id": Turn(5, "generation", base={"eos_token_id": MANY_ENDS}),
        "bos_token_id": Turn(7, "generation"),
        "eos_token_id": Turn(list(range(2, VOCAB)), "generation"),
        "classifier_dropout": Turn(0.3, "training", head="ImageClassification", base=PIXELS),
        "classifier_pooling": Turn("mean", "outputs", head="SequenceClassification"),
        "ngram_buckets": Turn(64, "shapes", head="SequenceClassification", base=NGRAMS),
        "ngram_sizes": Turn([1, 3], "gradients", head="SequenceClassification", base=NGRAMS),
        "ngram_skip": Turn(2, "gradients", head="SequenceClassification", base=NGRAMS),
        "ngram_spelling": Turn(4, "buffers", head="SequenceClassification", base=NGRAMS),
        "initializer_range": Turn(0.1, "weights"),
    }),
}  # fmt: skip
