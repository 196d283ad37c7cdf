"""Configuration of the bm_cnn family: convolutional networks for images and sequences."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .fields_bm import AudioTimes, check_ngrams, described
from .presets_bm import PresetMixin

_IMAGENET = {"image_size": 224, "num_labels": 1000}
_RESNET = {**_IMAGENET, "stem_type": "conv", "stem_width": 64, "norm_type": "batch_norm"}
PRESETS = {
    # 3-32-64 channels, 3x3 convolutions, 2x2 max pooling, 128 hidden units, 10 classes, on 32 x 32 pixels.
    "textbook-cnn": {
        "image_size": 32, "block_type": "plain", "hidden_sizes": [32, 64], "depths": [1, 1], "pooled_grid": 8,
        "classifier_hidden_sizes": [128], "num_labels": 10,
    },
    # A multilayer perceptron is a CNN without convolutions: pixels, 128 hidden units, 10 classes.
    "mlp-784-128-10": {
        "num_channels": 1, "image_size": 28, "block_type": "plain", "hidden_sizes": [], "depths": [],
        "pooled_grid": 28, "classifier_hidden_sizes": [128], "num_labels": 10,
    },
    # pytorch/examples, mnist/main.py.  Its dropout is 0.25 before and 0.5 after the hidden layer; here both are equal.
    "mnist-cnn": {
        "num_channels": 1, "image_size": 28, "block_type": "plain", "hidden_sizes": [32, 64], "depths": [1, 1],
        "paddings": 0, "pool_sizes": [1, 2], "pooled_grid": 12, "classifier_hidden_sizes": [128],
        "classifier_dropout": 0.5, "num_labels": 10,
    },
    # torchvision.models.alexnet: Krizhevsky 2014, arXiv:1404.5997.  It has no dropout before the last layer; this has.
    "alexnet": {
        **_IMAGENET, "block_type": "plain", "hidden_sizes": [64, 192, 384, 256, 256], "depths": [1, 1, 1, 1, 1],
        "kernel_sizes": [11, 5, 3, 3, 3], "paddings": [2, 2, 1, 1, 1], "strides": [4, 1, 1, 1, 1],
        "pool_sizes": [3, 3, 1, 1, 3], "pooled_grid": 6, "classifier_hidden_sizes": [4096, 4096],
        "classifier_dropout": 0.5,
    },
    # torchvision.models.vgg16: Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D.  It has no dropout
    # before the first hidden layer; here there is.
    "vgg-16": {
        **_IMAGENET, "block_type": "plain", "hidden_sizes": [64, 128, 256, 512, 512], "depths": [2, 2, 3, 3, 3],
        "pooled_grid": 7, "classifier_hidden_sizes": [4096, 4096], "classifier_dropout": 0.5,
    },
    # torchvision.models.resnet18 and resnet50: He et al. 2015, arXiv:1512.03385, table 1.
    "resnet-18": {
        **_RESNET, "block_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2],
    },
    "resnet-50": {
        **_RESNET, "block_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
    },
    # torchvision.models.convnext_tiny: Liu et al. 2022, arXiv:2201.03545, section 3.
    "convnext-t": {
        **_IMAGENET, "stem_type": "patch", "stem_width": 96, "patch_size": 4, "block_type": "convnext",
        "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "hidden_act": "gelu", "norm_eps": 1e-6,
        "drop_path_rate": 0.1,
    },
    # Kim 2014, arXiv:1408.5882, section 3.1: widths 3, 4, 5 with 100 filters each over 300-dimensional words.
    "kim-cnn": {
        "input_type": "tokens", "vocab_size": 20000, "block_type": "multi_width", "hidden_size": 300,
        "num_hidden_layers": 1, "filter_widths": [3, 4, 5], "norm_type": "none", "classifier_dropout": 0.5,
        "tie_word_embeddings": False,
    },
}  # fmt: skip

_IMAGE_BLOCKS = ("plain", "basic", "bottleneck", "convnext")
_DEFAULT_NORM = {"plain": "none", "basic": "batch_norm", "bottleneck": "batch_norm"}  # any other: layer_norm
_Sizes = list[int] | tuple[int, ...]


@strict
class BmCnnConfig(AudioTimes, PresetMixin, BackboneConfigMixin, PreTrainedConfig):
    """Architecture of a bm_cnn.

    `input_type` chooses between two trunks: stages of two-dimensional blocks over pixels, or layers of one-dimensional
    convolutions over tokens, audio frames or series.  The last of `hidden_sizes` of the former corresponds to
    `hidden_size` of the latter.  A field with one value per stage may be a single number for all stages.
    """

    model_type = "bm_cnn"
    keys_to_ignore_at_inference = ["past_key_values", "feature_maps", "loss_dict"]
    presets = PRESETS
    # Auto class -> model class; read by bmtk.models.register and saved as `auto_map` with every model.
    heads: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_bm_cnn.BmCnnModel",
        "AutoBackbone": "modeling_bm_cnn.BmCnnBackbone",
        "AutoModelForImageClassification": "modeling_bm_cnn.BmCnnForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_bm_cnn.BmCnnForMaskedImageModeling",
        "AutoModelForObjectDetection": "modeling_bm_cnn.BmCnnForObjectDetection",
        "AutoModelForCausalLM": "modeling_bm_cnn.BmCnnForCausalLM",
        "AutoModelForMaskedLM": "modeling_bm_cnn.BmCnnForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_bm_cnn.BmCnnForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_bm_cnn.BmCnnForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_bm_cnn.BmCnnForQuestionAnswering",
        "AutoModelForAudioClassification": "modeling_bm_cnn.BmCnnForAudioClassification",
        "AutoModelForCTC": "modeling_bm_cnn.BmCnnForCTC",
        "AutoModelForTimeSeriesPrediction": "modeling_bm_cnn.BmCnnForTimeSeriesPrediction",
    }
    scale_embedding: ClassVar[bool] = False  # read by TokenStem; not an option of this family

    input_type: Literal["pixels", "tokens", "audio", "series"] = described("pixels", "what the model reads")
    block_type: Literal["plain", "basic", "bottleneck", "convnext", "residual", "gated", "multi_width"] | None = (
        described(
            None,
            "block of an image model: one of the first four, default: basic; of a sequence model: one of the last "
            "three, default: residual",
        )
    )
    hidden_act: Literal["relu", "gelu", "silu", "tanh"] = described("relu", "activation function")
    norm_type: Literal["batch_norm", "layer_norm", "none"] | None = described(
        None, "normalization; default: as in the paper of the block (none for plain, batch_norm for basic, ...)"
    )
    norm_eps: int | float = described(1e-5, "added to the variance in a normalization, against division by zero")
    hidden_size: int | None = described(
        None, "width of a position of a sequence, default: 256; of images: the last of hidden_sizes"
    )
    num_hidden_layers: int | None = described(
        None, "layers of a sequence model, default: 6; of images: the number of stages"
    )

    # Images
    num_channels: int = described(3, "channels of an image: 3 for RGB, 1 for greyscale")
    image_size: int = described(
        32, "height and width of an image after preprocessing, pixels; the convolutions take any size"
    )
    stem_type: Literal["none", "conv", "patch"] = described(
        "none", "what reads the pixels: convolution, norm and activation (conv), or one position per patch (patch)"
    )
    stem_width: int | None = described(
        None, "channels after the stem; default: the first of hidden_sizes, or num_channels without a stem"
    )
    stem_kernel_size: int = described(7, "kernel size of stem_type=conv, pixels")
    stem_stride: int = described(2, "stride of stem_type=conv, pixels")
    stem_pooling: bool = described(True, "3x3 pooling with stride 2 after stem_type=conv")
    stem_pools_first: bool = described(
        False, "pool between the stem's convolution and its norm, which then has a quarter of the positions to compute"
    )
    patch_size: int = described(
        4, "height and width of a patch of stem_type=patch, pixels; of a series: steps per position"
    )
    hidden_sizes: _Sizes = described((64, 128, 256), "channels of each stage")
    depths: _Sizes = described((2, 2, 2), "blocks of each stage")
    kernel_sizes: _Sizes | int | None = described(
        None, "kernel size of each stage, or of all, pixels; default: 3, or 7 for convnext"
    )
    paddings: _Sizes | int | None = described(
        None, "padding of the convolutions of each stage, or of all, pixels; default: half the kernel size"
    )
    strides: _Sizes | int | None = described(
        None, "stride of each stage, pixels; default: 1 for plain blocks, else 1 for the first stage, 2 for the others"
    )
    pool_sizes: _Sizes | int | None = described(
        None, "pooling window after each stage, pixels; 1: no pooling; default: 2 for plain blocks, else 1"
    )
    pool_stride: int = described(2, "stride of the pooling after a stage, pixels")
    pools_first: bool = described(
        False,
        "plain blocks pool between the last convolution of a stage and its norm, which then has as few "
        "positions to compute as the next stage",
    )
    pooling_type: Literal["max", "avg"] = described("max", "pooling after the stages and in the stem")
    expansion: int = described(
        4, "outer width / inner width of a bottleneck block; inner width / outer width of a convnext block"
    )
    downsample_in_bottleneck: bool = described(
        False, "where a bottleneck block strides: its first convolution (true: the paper), or its 3x3 (torchvision)"
    )
    layer_scale_init_value: int | float = described(1e-6, "initial factor on what a convnext block adds to its input")
    drop_path_rate: int | float = described(
        0.0, "probability that the last block is skipped, per image (stochastic depth); linearly less for earlier ones"
    )
    pooled_grid: int = described(
        1, "cells per side of the grid that a classifier reads; 1: the average of all positions"
    )
    classifier_hidden_sizes: _Sizes = described((), "widths of fully connected layers before the classifier")

    # Object detection
    fpn_size: int = described(256, "channels of the feature pyramid")
    num_feature_levels: int = described(
        5,
        "levels of the feature pyramid; up to three are stages of the model, the others are computed from them",
    )
    num_detection_layers: int = described(4, "3x3 convolutions of each detection tower (classes, boxes)")
    center_sampling_radius: int | float = described(
        1.5, "locations within this many strides of a box's centre are trained to predict it; 0: the whole box"
    )
    box_loss: Literal["giou", "iou"] = described("giou", "loss of predicted boxes: generalized IoU, or IoU")
    focal_alpha: int | float = described(0.25, "weight of objects against background in the focal loss, 0 to 1")
    focal_gamma: int | float = described(
        2.0, "exponent of the focal loss: the larger, the less locations count that are already classified well"
    )

    # Sequences
    vocab_size: int = described(4096, "tokens in the vocabulary, rows of the token embedding")
    kernel_size: int = described(3, "kernel size of residual and gated convolutions, positions")
    dilation_cycle: int = described(10, "layers after which the dilations 1, 2, 4, ... start again")
    filter_widths: _Sizes = described((3, 4, 5), "kernel sizes of a multi_width block, positions")
    is_causal: bool | None = described(
        None, "no position reads a later one; default: true for tokens, unless block_type=multi_width"
    )
    position_embedding_type: Literal["none", "sinusoidal", "learned"] = described(
        "none",
        "what is added to embeddings to encode positions; convolutions encode relative positions without it, and "
        "learned ones start at 0",
    )
    max_position_embeddings: int = described(2048, "longest row for learned positions, in positions")
    embedding_dropout: int | float = described(0.0, "dropout probability, on embeddings")
    hidden_dropout: int | float = described(0.0, "dropout probability, on the output of convolutions")
    tie_word_embeddings: bool = described(True, "share the token embedding with the output layer")
    num_mel_bins: int = described(80, "mel bands of an audio frame; four frames make a position")
    hop_length: int = described(
        160, "samples from one audio frame to the next; recipes write that of the feature extractor (hop_ms)"
    )
    context_length: int = described(96, "steps of a series that the model reads")
    prediction_length: int = described(24, "steps of a series that the model predicts")
    num_input_channels: int = described(1, "numbers per step of a series")
    num_time_features: int = described(
        0, "calendar covariates per step of a series, known for the past and for the future"
    )
    linear_forecast: bool = described(
        False, "add a linear map of the normalized past to a forecast, the same for every channel"
    )
    series_loss: Literal["mse", "mae", "huber", "quantile", "student_t"] = described(
        "mse", "loss of a forecast: squared, absolute or Huber error, pinball loss, or Student's t likelihood"
    )
    quantiles: list[int | float] | tuple[int | float, ...] = described(
        (0.1, 0.5, 0.9), "quantiles to predict, from 0 to 1, for series_loss=quantile; 0.5 must be among them"
    )
    use_cache: bool = described(True, "keep keys, values or states between steps of generation")
    pad_token_id: int | None = described(None, "token id of padding; default: none")
    bos_token_id: int | None = described(None, "token id that begins a text; default: none")
    eos_token_id: int | list[int] | None = described(None, "token id, or ids, that end a text; default: none")

    # Every head
    classifier_dropout: int | float = described(0.0, "dropout probability, on the input of each layer of a classifier")
    classifier_pooling: Literal["last", "mean", "first", "max"] | None = described(
        None,
        "how a classifier of sequences turns all positions into one vector; default: last if causal, else mean, "
        "and max for block_type=multi_width",
    )
    ngram_sizes: list[int] | tuple[int, ...] = described(
        (1, 2), "lengths of the n-grams of tokens that a text classifier reads beside the network"
    )
    ngram_skip: int = described(
        0, "tokens between those of further pairs that it reads, at most: 2 adds pairs with one and with two between"
    )
    ngram_buckets: int = described(
        0, "rows of the table in which these n-grams have their weights, found by a hash; 0: none are read"
    )
    ngram_spelling: int = described(
        0, "n-grams of characters of each token that are read beside those of tokens, at most; 0: none"
    )
    initializer_range: int | float = described(
        0.02, "standard deviation of initial linear layers and embeddings; convolutions: Kaiming initialization"
    )

    def __post_init__(self, **kwargs):
        self._fill_images() if self.input_type == "pixels" else self._fill_sequences()
        if self.norm_type is None:
            self.norm_type = _DEFAULT_NORM.get(self.block_type, "layer_norm")
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        self.ngram_sizes = list(self.ngram_sizes)
        super().__post_init__(**kwargs)
        # The code is saved with every model, so an auto_map that points to another repository must be replaced.
        self.auto_map = {"AutoConfig": "configuration_bm_cnn.BmCnnConfig", **self.heads}

    def _fill_images(self):
        self.block_type = self.block_type or "basic"
        for name in ("hidden_sizes", "depths", "classifier_hidden_sizes"):
            setattr(self, name, list(getattr(self, name)))
        num_stages = len(self.hidden_sizes)
        plain = self.block_type == "plain"
        if self.stem_type == "none":
            self._derive("stem_width", self.num_channels, "num_channels, for stem_type='none'")
        elif self.stem_width is None:
            self.stem_width = self.hidden_sizes[0] if self.hidden_sizes else self.num_channels
        self.kernel_sizes = _per_stage(self.kernel_sizes, [7 if self.block_type == "convnext" else 3] * num_stages)
        self.paddings = _per_stage(self.paddings, [size // 2 for size in self.kernel_sizes])
        self.strides = _per_stage(self.strides, [1 if plain or i == 0 else 2 for i in range(num_stages)])
        self.pool_sizes = _per_stage(self.pool_sizes, [2 if plain else 1] * num_stages)
        self._derive("hidden_size", [self.stem_width, *self.hidden_sizes][-1], "the last of hidden_sizes")
        self._derive("num_hidden_layers", num_stages, "the number of hidden_sizes")
        self.is_causal = False

    def _fill_sequences(self):
        self.block_type = self.block_type or "residual"
        self.hidden_size = 256 if self.hidden_size is None else self.hidden_size
        self.num_hidden_layers = 6 if self.num_hidden_layers is None else self.num_hidden_layers
        self.filter_widths, self.quantiles = list(self.filter_widths), list(self.quantiles)
        if self.is_causal is None:
            self.is_causal = self.input_type == "tokens" and self.block_type != "multi_width"
        if self.classifier_pooling is None:
            over_all = "max" if self.block_type == "multi_width" else "mean"
            self.classifier_pooling = "last" if self.is_causal else over_all

    def _derive(self, name: str, value: int, source: str):
        if getattr(self, name) not in (None, value):
            raise ValueError(f"{name}={getattr(self, name)} is not {value}, {source}; leave it out")
        setattr(self, name, value)

    @property
    def stage_strides(self) -> list[int]:
        """Pixels per position of the stem's output and of each stage's, along each side."""
        of_conv = self.stem_stride * (2 if self.stem_pooling else 1)
        strides = [{"none": 1, "patch": self.patch_size, "conv": of_conv}[self.stem_type]]
        for stride, pool in zip(self.strides, self.pool_sizes, strict=True):
            strides.append(strides[-1] * stride * (self.pool_stride if pool > 1 else 1))
        return strides

    @property
    def layer_types(self) -> list[str]:
        """Cache type of each layer, for `DynamicCache(config=...)`; a property, so that it is not saved."""
        return ["bm_convolution"] * self.num_hidden_layers

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What is gathered together when weights are spread over processes: a stage (images) or a layer."""
        return {"stages.*" if self.input_type == "pixels" else "layers.*": "free_full_weight"}

    def validate_layer_type(self):
        """Override the check of the base class, which allows only transformers' own layer types."""

    def validate_blocks(self):
        is_image = self.input_type == "pixels"
        allowed = _IMAGE_BLOCKS if is_image else ("residual", "gated", "multi_width")
        if self.block_type not in allowed:
            raise ValueError(
                f"block_type={self.block_type!r} is not for input_type={self.input_type!r}; choose "
                f"{', '.join(allowed)}"
            )
        if not is_image and self.norm_type == "batch_norm":
            raise ValueError(
                "norm_type='batch_norm' would mix positions and padding of a sequence; choose 'layer_norm' or 'none'"
            )
        if not is_image and self.block_type == "multi_width" and self.hidden_size % len(self.filter_widths):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of the {len(self.filter_widths)} filter_widths, "
                "which share it equally"
            )
        if self.input_type == "series" and self.context_length % self.patch_size:
            raise ValueError(
                f"context_length={self.context_length} is not a multiple of patch_size={self.patch_size}; change one "
                "of them (patch_size=1 makes a position of every step)"
            )

    def validate_stages(self):
        if self.input_type != "pixels":
            return
        if self.stem_pools_first and not (self.stem_type == "conv" and self.stem_pooling):
            raise ValueError(
                f"stem_pools_first is for stem_type='conv' with stem_pooling; this has stem_type={self.stem_type!r}, "
                f"stem_pooling={self.stem_pooling}"
            )
        if self.pools_first and self.block_type != "plain":
            raise ValueError(
                f"pools_first is for block_type='plain', with one convolution a block; this is {self.block_type!r}"
            )
        for name in ("depths", "kernel_sizes", "paddings", "strides", "pool_sizes"):
            if len(getattr(self, name)) != len(self.hidden_sizes):
                raise ValueError(
                    f"{name}={getattr(self, name)} has {len(getattr(self, name))} entries; hidden_sizes="
                    f"{self.hidden_sizes} has {len(self.hidden_sizes)} stages"
                )
        if any(depth < 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: every stage needs at least 1 block")
        if self.block_type == "bottleneck" and any(width % self.expansion for width in self.hidden_sizes):
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must be multiples of expansion={self.expansion}")

    def validate_ngrams(self):
        check_ngrams(self.ngram_sizes, self.ngram_skip, self.ngram_buckets, self.ngram_spelling)

    def validate_probabilities(self):
        for name in ("embedding_dropout", "hidden_dropout", "classifier_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; choose 0 <= {name} < 1")


def _per_stage(given, default: list[int]) -> list[int]:
    if given is None:
        return default
    return [given] * len(default) if isinstance(given, int) else list(given)


__all__ = ["PRESETS", "BmCnnConfig"]
