"""Configuration of the bm_cnn family: convolutional networks for images and sequences by fields, not by classes."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

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
    # pytorch/examples, mnist/main.py.  Its dropout is 0.25 before and 0.5 after the hidden layer; ours is one.
    "mnist-cnn": {
        "num_channels": 1, "image_size": 28, "block_type": "plain", "hidden_sizes": [32, 64], "depths": [1, 1],
        "paddings": 0, "pool_sizes": [1, 2], "pooled_grid": 12, "classifier_hidden_sizes": [128],
        "classifier_dropout": 0.5, "num_labels": 10,
    },
    # torchvision.models.alexnet: Krizhevsky 2014, arXiv:1404.5997.  Its dropout spares the last layer; ours does not.
    "alexnet": {
        **_IMAGENET, "block_type": "plain", "hidden_sizes": [64, 192, 384, 256, 256], "depths": [1, 1, 1, 1, 1],
        "kernel_sizes": [11, 5, 3, 3, 3], "paddings": [2, 2, 1, 1, 1], "strides": [4, 1, 1, 1, 1],
        "pool_sizes": [3, 3, 1, 1, 3], "pooled_grid": 6, "classifier_hidden_sizes": [4096, 4096],
        "classifier_dropout": 0.5,
    },
    # torchvision.models.vgg16: Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D.  Its dropout spares the
    # first hidden layer; ours does not.
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
class BmCnnConfig(PresetMixin, BackboneConfigMixin, PreTrainedConfig):
    """What a bm_cnn is made of.

    `input_type` decides between two trunks: stages of two-dimensional blocks over pixels, or layers of one-dimensional
    convolutions over tokens, audio frames or series.  The last width of the one is the `hidden_size` of the other.
    A field that is given once for all stages may be one number.
    """

    model_type = "bm_cnn"
    keys_to_ignore_at_inference = ["past_key_values", "feature_maps", "loss_dict"]
    presets = PRESETS
    # Auto class -> the class that serves it; read by bmtk.models.register and saved as `auto_map` with every model.
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
    scale_embedding: ClassVar[bool] = False  # what a TokenStem asks, and no CNN needs

    input_type: Literal["pixels", "tokens", "audio", "series"] = "pixels"
    # Of images the first four, None: basic; of sequences the last three, None: residual.
    block_type: Literal["plain", "basic", "bottleneck", "convnext", "residual", "gated", "multi_width"] | None = None
    hidden_act: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    norm_type: Literal["batch_norm", "layer_norm", "none"] | None = None  # None: as the block's paper has it
    norm_eps: int | float = 1e-5
    hidden_size: int | None = None  # width of a position; images: the last of hidden_sizes; sequences, None: 256
    num_hidden_layers: int | None = None  # images: the stages; sequences, None: 6

    # Images
    num_channels: int = 3
    image_size: int = 32  # pixels per side that an image processor makes; the trunk itself takes any size
    stem_type: Literal["none", "conv", "patch"] = "none"  # conv: convolution, norm, activation; patch: one per patch
    stem_width: int | None = None  # channels after the stem; None: the first of hidden_sizes, or num_channels
    stem_kernel_size: int = 7  # of stem_type "conv"
    stem_stride: int = 2  # of stem_type "conv"
    stem_pooling: bool = True  # of stem_type "conv": then pool 3x3 with stride 2
    patch_size: int = 4  # pixels per side, of stem_type "patch"; of a series: steps per position
    hidden_sizes: _Sizes = (64, 128, 256)  # channels of each stage
    depths: _Sizes = (2, 2, 2)  # blocks of each stage
    kernel_sizes: _Sizes | int | None = None  # of each stage; None: 3, or 7 for convnext
    paddings: _Sizes | int | None = None  # pixels around each convolution of a stage; None: half the kernel
    strides: _Sizes | int | None = None  # of each stage; None: 1 if plain, else 1 for the first and 2 for the others
    pool_sizes: _Sizes | int | None = None  # pooling window after each stage, 1: none; None: 2 if plain, else 1
    pool_stride: int = 2  # of the pooling after a stage
    pooling_type: Literal["max", "avg"] = "max"  # after stages and in the stem
    expansion: int = 4  # width of a bottleneck block over its inner width; inner over outer width of a convnext block
    # Of a bottleneck block, True: its first convolution strides, as in the paper; False: the next, as in torchvision.
    downsample_in_bottleneck: bool = False
    layer_scale_init_value: int | float = 1e-6  # factor on what a convnext block adds, where it starts
    drop_path_rate: int | float = 0.0  # probability that the last block adds nothing, per image; earlier blocks less
    pooled_grid: int = 1  # cells per side that a classifier reads; 1: the average of all positions
    classifier_hidden_sizes: _Sizes = ()  # fully connected layers before the classifier

    # Object detection
    fpn_size: int = 256  # channels of the feature pyramid
    num_feature_levels: int = 5  # levels of the pyramid; the first, up to three, from the trunk
    num_detection_layers: int = 4  # convolutions of each tower
    center_sampling_radius: int | float = 1.5  # strides around a box's centre that learn it; 0: all of the box
    box_loss: Literal["giou", "iou"] = "giou"
    focal_alpha: int | float = 0.25  # weight of objects against background
    focal_gamma: int | float = 2.0  # how much less a location counts that is right already

    # Sequences
    vocab_size: int = 4096  # tokens the embedding knows
    kernel_size: int = 3  # taps of residual and gated convolutions
    dilation_cycle: int = 10  # dilations are 1, 2, 4, ..., and start again after so many layers
    filter_widths: _Sizes = (3, 4, 5)  # of multi_width
    is_causal: bool | None = None  # no position sees a later one; None: True for tokens, but for multi_width
    position_embedding_type: Literal["none", "sinusoidal", "learned"] = "none"  # convolutions know what is near
    max_position_embeddings: int = 2048  # longest row for learned positions
    embedding_dropout: int | float = 0.0  # probability, on embeddings
    hidden_dropout: int | float = 0.0  # probability, on what convolutions add
    tie_word_embeddings: bool = True  # the output head shares the token embedding
    num_mel_bins: int = 80  # mel bands of an audio frame; four frames make a position
    context_length: int = 96  # steps of a series that are seen
    prediction_length: int = 24  # steps of a series that are predicted
    num_input_channels: int = 1  # numbers per step of a series
    num_time_features: int = 0  # calendar covariates per step of a series, known of the past and of the future
    series_loss: Literal["mse", "mae", "huber", "quantile", "student_t"] = "mse"
    quantiles: list[int | float] | tuple[int | float, ...] = (0.1, 0.5, 0.9)  # of series_loss "quantile"; one is 0.5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # Every head
    classifier_dropout: int | float = 0.0  # probability, on what every layer of a classifier reads
    # Of sequences; None: last if causal, else mean, and for multi_width max.
    classifier_pooling: Literal["last", "mean", "first", "max"] | None = None
    initializer_range: int | float = 0.02  # standard deviation of linear layers and embeddings; convolutions: Kaiming

    def __post_init__(self, **kwargs):
        self._fill_images() if self.input_type == "pixels" else self._fill_sequences()
        if self.norm_type is None:
            self.norm_type = _DEFAULT_NORM.get(self.block_type, "layer_norm")
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)
        # Code is saved beside every model: a map that a loaded config carries from elsewhere must not survive.
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
        """What `DynamicCache(config=...)` makes of each layer; a property, so that it is not saved."""
        return ["bm_convolution"] * self.num_hidden_layers

    def validate_layer_type(self):
        """Take the place of the base class's check, which knows the library's own names only."""

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

    def validate_probabilities(self):
        for name in ("embedding_dropout", "hidden_dropout", "classifier_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; choose 0 <= {name} < 1")


def _per_stage(given, default: list[int]) -> list[int]:
    if given is None:
        return default
    return [given] * len(default) if isinstance(given, int) else list(given)


__all__ = ["PRESETS", "BmCnnConfig"]
