"""Configuration of the bm_transformer family: modern and classic Transformers by fields, not by classes."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .presets_bm import PresetMixin

_CLASSIC = {"norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True}
PRESETS = {
    # Vaswani et al. 2017, arXiv:1706.03762: "base" of table 3, 65 M to two digits.  63,082,496 parameters by their
    # text: 18,944,000 of one embedding of 37,000 tokens (sec. 5.1), 44,138,496 of the layers, with biases in attention
    # as torch.nn.Transformer has them (36,864; their own code left these out).
    "transformer-base-2017": {
        **_CLASSIC, "vocab_size": 37000, "hidden_size": 512, "num_hidden_layers": 6, "decoder_layers": 6,
        "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "relu", "norm_position": "post",
        "position_embedding_type": "sinusoidal", "scale_embedding": True, "is_encoder_decoder": True,
        "embedding_dropout": 0.1, "hidden_dropout": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    # google-bert/bert-base-uncased: Devlin et al. 2018, arXiv:1810.04805; 109,482,240 parameters with the pooler.
    "bert-base": {
        **_CLASSIC, "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "hidden_act": "gelu", "norm_position": "post", "norm_eps": 1e-12,
        "position_embedding_type": "learned", "max_position_embeddings": 512, "type_vocab_size": 2,
        "embedding_norm": True, "with_pooler": True, "classifier_pooling": "first", "is_causal": False,
        "embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1, "classifier_dropout": 0.1,
        "pad_token_id": 0,
    },
    # openai-community/gpt2: Radford et al. 2019; 124,439,808 parameters.
    "gpt2-small": {
        **_CLASSIC, "vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "hidden_act": "gelu_new", "position_embedding_type": "learned", "max_position_embeddings": 1024,
        "embedding_dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1, "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    # ViT-S/16 for 224 x 224 pixels and 1,000 labels: Touvron et al. 2020 (DeiT-S), arXiv:2012.12877; 22,050,664
    # parameters.
    "vit-s-16": {
        **_CLASSIC, "input_type": "pixels", "image_size": 224, "patch_size": 16, "hidden_size": 384,
        "num_hidden_layers": 12, "num_attention_heads": 6, "hidden_act": "gelu", "norm_eps": 1e-6,
        "position_embedding_type": "learned", "classifier_pooling": "first", "num_labels": 1000,
    },
    # TinyLlama/TinyLlama-1.1B: Zhang et al. 2024, arXiv:2401.02385; 1,100,048,384 parameters.
    "tinyllama-1.1b": {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "intermediate_size": 5632, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2,
    },
}  # fmt: skip


@strict
class BmTransformerConfig(PresetMixin, PreTrainedConfig):
    """What a bm_transformer is made of.

    The defaults describe a small modern decoder (rotary positions, pre-RMSNorm, SwiGLU).  `hidden_act="gelu"`,
    `position_embedding_type="learned"`, `norm_type="layer_norm"` and biases give GPT-2; `"sinusoidal"`, `"post"`,
    `"relu"` and `scale_embedding` give the Transformer of 2017.

    An encoder-decoder has `num_hidden_layers` layers on the side of the encoder, which sees everything, and
    `decoder_layers` on the side of the decoder, which is causal.
    """

    model_type = "bm_transformer"
    keys_to_ignore_at_inference = ["past_key_values", "feature_maps", "loss_dict"]
    presets = PRESETS
    # Auto class -> the class that serves it; read by bmtk.models.register and saved as `auto_map` with every model.
    heads: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_bm_transformer.BmTransformerModel",
        "AutoModelForCausalLM": "modeling_bm_transformer.BmTransformerForCausalLM",
        "AutoModelForMaskedLM": "modeling_bm_transformer.BmTransformerForMaskedLM",
        "AutoModelForSeq2SeqLM": "modeling_bm_transformer.BmTransformerForSeq2SeqLM",
        "AutoModelForSequenceClassification": "modeling_bm_transformer.BmTransformerForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_bm_transformer.BmTransformerForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_bm_transformer.BmTransformerForQuestionAnswering",
        "AutoModelForImageClassification": "modeling_bm_transformer.BmTransformerForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_bm_transformer.BmTransformerForMaskedImageModeling",
        "AutoModelForObjectDetection": "modeling_bm_transformer.BmTransformerForObjectDetection",
        "AutoModelForAudioClassification": "modeling_bm_transformer.BmTransformerForAudioClassification",
        "AutoModelForCTC": "modeling_bm_transformer.BmTransformerForCTC",
        "AutoModelForTimeSeriesPrediction": "modeling_bm_transformer.BmTransformerForTimeSeriesPrediction",
    }
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    input_type: Literal["tokens", "pixels", "audio", "series"] = "tokens"
    vocab_size: int = 4096  # tokens the embedding knows
    hidden_size: int = 256  # width of a position
    num_hidden_layers: int = 6
    num_attention_heads: int = 8  # query heads
    num_key_value_heads: int | None = None  # fewer than query heads: grouped-query attention; None: as many
    head_dim: int | None = None  # width of one head; None: hidden_size / num_attention_heads
    intermediate_size: int | None = None  # MLP width; None: 4 x hidden_size, or 8/3 of it for swiglu (same parameters)
    hidden_act: Literal["swiglu", "gelu", "gelu_new", "relu", "relu2"] = "swiglu"  # relu2: squared ReLU
    position_embedding_type: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    max_position_embeddings: int = 2048  # longest context, tokens
    rope_theta: int | float = 10000.0  # base of the rotary frequencies, unless rope_parameters says more
    rope_parameters: dict | None = None  # transformers' rope dictionary (rope_type, factor, ...); None: plain rotary
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: int | float = 1e-5
    qk_norm: bool = False  # RMS-normalise each query and key head before the rotation
    attention_bias: bool = False  # biases of the four attention projections
    mlp_bias: bool = False  # biases of the MLP projections
    is_causal: bool | None = None  # False: every position sees every other (an encoder); None: True for tokens only
    type_vocab_size: int = (
        0  # kinds of tokens (a question, its text) with an embedding each; 0: token_type_ids say nothing
    )
    embedding_norm: bool = False  # LayerNorm on the sum of the embeddings (BERT)
    scale_embedding: bool = False  # multiply token embeddings by sqrt(hidden_size)
    tie_word_embeddings: bool = True  # the output head shares the token embedding
    embedding_dropout: int | float = 0.0  # probability, on the sum of token and position embedding
    hidden_dropout: int | float = 0.0  # probability, on what attention and MLP add to the residual stream
    attention_dropout: int | float = 0.0  # probability, on attention weights
    classifier_dropout: int | float = 0.0  # probability, on what a classification head reads
    classifier_pooling: Literal["first", "last", "mean", "max"] | None = None  # None: last if causal, else mean
    with_pooler: bool = False  # dense layer and tanh on the pooled position (BERT)
    initializer_range: int | float = 0.02  # standard deviation; projections into the residual are divided by sqrt(2L)
    use_cache: bool = True
    is_encoder_decoder: bool = False
    decoder_layers: int | None = None  # of an encoder-decoder, as caches call them; None: num_hidden_layers
    decoder_start_token_id: int | None = None  # what a decoder reads first
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    # Images
    num_channels: int = 3
    image_size: int = 224  # pixels per side that an image processor makes, and that learned positions are for
    patch_size: int = 16  # pixels per side of a position; of a series: steps per position

    # Object detection
    fpn_size: int = 256  # channels of the feature pyramid
    num_feature_levels: int = 5  # levels of the pyramid; the first from the trunk
    num_detection_layers: int = 4  # convolutions of each tower
    center_sampling_radius: int | float = (
        1.5  # strides around a box's centre that learn to predict it; 0: all of the box
    )
    box_loss: Literal["giou", "iou"] = "giou"
    focal_alpha: int | float = 0.25  # weight of objects against background
    focal_gamma: int | float = 2.0  # how much less a location counts that is right already

    # Audio
    num_mel_bins: int = 80  # mel bands of a frame; four frames make a position

    # Series
    context_length: int = 96  # steps that are seen
    prediction_length: int = 24  # steps that are predicted
    num_input_channels: int = 1  # numbers per step
    num_time_features: int = 0  # calendar covariates per step, known of the past and of the future
    series_loss: Literal["mse", "mae", "huber", "quantile", "student_t"] = "mse"
    quantiles: list[int | float] | tuple[int | float, ...] = (0.1, 0.5, 0.9)  # of series_loss "quantile"; one is 0.5

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = _default_mlp_width(self.hidden_size, gated=self.hidden_act == "swiglu")
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.is_causal is None:
            self.is_causal = self.input_type == "tokens"
        if self.decoder_layers is None and self.is_encoder_decoder:
            self.decoder_layers = self.num_hidden_layers
        self.quantiles = list(self.quantiles)
        if self.classifier_pooling is None:
            self.classifier_pooling = "last" if self.is_causal else "mean"
        super().__post_init__(**kwargs)
        # Code is saved beside every model: a map that a loaded config carries from elsewhere must not survive.
        self.auto_map = {"AutoConfig": "configuration_bm_transformer.BmTransformerConfig", **self.heads}

    def validate_heads(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; each key head serves a whole group of query heads"
            )
        whole, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest and self.head_dim == whole:  # the default; any other width was asked for
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}; change one of them, or set head_dim"
            )
        if self.position_embedding_type == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions turn pairs, so choose an even one")
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd; sinusoidal positions need an even width")

    def validate_inputs(self):
        if self.is_encoder_decoder and (self.input_type != "tokens" or not self.is_causal):
            raise ValueError(
                f"is_encoder_decoder=True reads and writes tokens, and its decoder is causal; input_type="
                f"{self.input_type!r} and is_causal={self.is_causal} do not go with it, leave them out"
            )
        if self.input_type == "pixels" and self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; change one of them"
            )
        if self.input_type == "series" and self.context_length % self.patch_size:
            raise ValueError(
                f"context_length={self.context_length} is not a multiple of patch_size={self.patch_size}; change one "
                "of them (patch_size=1 makes a position of every step)"
            )

    def validate_probabilities(self):
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; choose 0 <= {name} < 1")


def _default_mlp_width(hidden_size: int, *, gated: bool) -> int:
    """4 x width, or 8/3 x width (rounded up to a multiple of 8) for a gated MLP, whose third matrix costs as much."""
    return -(-8 * hidden_size // 3 // 8) * 8 if gated else 4 * hidden_size


__all__ = ["PRESETS", "BmTransformerConfig"]
