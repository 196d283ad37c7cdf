"""Configuration of the bm_transformer family: modern and classic Transformers."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .fields_bm import AudioTimes, check_ngrams, described
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
class BmTransformerConfig(AudioTimes, PresetMixin, PreTrainedConfig):
    """Architecture of a bm_transformer.

    The defaults describe a small modern decoder (rotary positions, pre-RMSNorm, SwiGLU).  `hidden_act="gelu"`,
    `position_embedding_type="learned"`, `norm_type="layer_norm"` and biases give GPT-2; `"sinusoidal"`, `"post"`,
    `"relu"` and `scale_embedding` give the Transformer of 2017.

    An encoder-decoder has `num_hidden_layers` bidirectional encoder layers and `decoder_layers` causal decoder layers.
    """

    model_type = "bm_transformer"
    keys_to_ignore_at_inference = ["past_key_values", "feature_maps", "loss_dict"]
    presets = PRESETS
    # Auto class -> model class; read by bmtk.models.register and saved as `auto_map` with every model.
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
    input_type: Literal["tokens", "pixels", "audio", "series"] = described("tokens", "what the model reads")
    vocab_size: int = described(4096, "tokens in the vocabulary, rows of the token embedding")
    hidden_size: int = described(256, "width of a position")
    num_hidden_layers: int = described(6, "layers; of an encoder-decoder, those of the encoder")
    num_attention_heads: int = described(8, "query heads of each layer")
    num_key_value_heads: int | None = described(
        None, "key and value heads; fewer than query heads: grouped-query attention; default: num_attention_heads"
    )
    head_dim: int | None = described(None, "width of one attention head; default: hidden_size / num_attention_heads")
    intermediate_size: int | None = described(
        None, "hidden units of an MLP; default: 4 x hidden_size, or 8/3 x hidden_size for swiglu (same parameters)"
    )
    hidden_act: Literal["swiglu", "gelu", "gelu_new", "relu", "relu2"] = described(
        "swiglu", "activation of the MLP; gelu_new: tanh approximation, as in GPT-2; relu2: squared ReLU"
    )
    position_embedding_type: Literal["rotary", "sinusoidal", "learned"] = described(
        "rotary", "how positions are encoded: rotary turns queries and keys, the others are added to the embedding"
    )
    max_position_embeddings: int = described(2048, "longest row, in positions (tokens of a text)")
    rope_theta: int | float = described(
        10000.0,
        "base of the rotary frequencies, unless rope_parameters sets one; rows of 64 tokens learn faster with 100",
    )
    rope_parameters: dict | None = described(
        None, "transformers' dictionary of rotary scaling (rope_type, factor, ...) as JSON; default: no scaling"
    )
    norm_type: Literal["rms_norm", "layer_norm"] = described("rms_norm", "normalization of each layer")
    norm_position: Literal["pre", "post"] = described(
        "pre", "normalize before attention and MLP (pre), or after the residual addition (post: 2017, BERT)"
    )
    norm_eps: int | float = described(1e-5, "added to the variance in a normalization, against division by zero")
    qk_norm: bool = described(False, "RMS-normalize each query and key head before the rotation")
    attention_bias: bool = described(False, "biases in the four attention projections")
    mlp_bias: bool = described(False, "biases in the MLP projections")
    is_causal: bool | None = described(
        None, "no position attends to a later one; false: an encoder; default: true for tokens, else false"
    )
    type_vocab_size: int = described(
        0, "segment types with an embedding each (a question, its text); 0: token_type_ids are ignored"
    )
    embedding_norm: bool = described(False, "LayerNorm on the sum of the embeddings, as in BERT")
    scale_embedding: bool = described(False, "multiply token embeddings by sqrt(hidden_size)")
    tie_word_embeddings: bool = described(True, "share the token embedding with the output layer")
    embedding_dropout: int | float = described(0.0, "dropout probability, on the sum of the embeddings")
    hidden_dropout: int | float = described(0.0, "dropout probability, on the outputs of attention and MLP")
    attention_dropout: int | float = described(0.0, "dropout probability, on attention weights")
    classifier_dropout: int | float = described(0.0, "dropout probability, on the input of a classification head")
    classifier_pooling: Literal["first", "last", "mean", "max"] | None = described(
        None, "how a classifier turns all positions into one vector; default: last if causal, else mean"
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
    with_pooler: bool = described(False, "dense layer and tanh on the pooled position, as in BERT")
    initializer_range: int | float = described(
        0.02,
        "standard deviation of initial weights; output projections of attention and MLP: divided by sqrt(2 x layers)",
    )
    use_cache: bool = described(True, "keep keys, values or states between steps of generation")
    is_encoder_decoder: bool = described(False, "an encoder for the source text and a causal decoder for the target")
    decoder_layers: int | None = described(
        None, "layers of the decoder of an encoder-decoder; default: num_hidden_layers"
    )
    decoder_start_token_id: int | None = described(
        None, "token id that a decoder reads first; default: none, tasks choose the padding token"
    )
    pad_token_id: int | None = described(None, "token id of padding; default: none")
    bos_token_id: int | None = described(None, "token id that begins a text; default: none")
    eos_token_id: int | list[int] | None = described(None, "token id, or ids, that end a text; default: none")

    # Images
    num_channels: int = described(3, "channels of an image: 3 for RGB, 1 for greyscale")
    image_size: int = described(224, "height and width of an image after preprocessing, pixels")
    patch_size: int = described(16, "height and width of a patch, pixels; of a series: steps per position")

    # Object detection
    fpn_size: int = described(256, "channels of the feature pyramid")
    num_feature_levels: int = described(5, "levels of the feature pyramid; the first comes from the model")
    num_detection_layers: int = described(4, "3x3 convolutions of each detection tower (classes, boxes)")
    center_sampling_radius: int | float = described(
        1.5, "locations within this many strides of a box's centre are trained to predict it; 0: the whole box"
    )
    box_loss: Literal["giou", "iou"] = described("giou", "loss of predicted boxes: generalized IoU, or IoU")
    focal_alpha: int | float = described(0.25, "weight of objects against background in the focal loss, 0 to 1")
    focal_gamma: int | float = described(
        2.0, "exponent of the focal loss: the larger, the less locations count that are already classified well"
    )

    # Audio
    num_mel_bins: int = described(80, "mel bands of an audio frame; four frames make a position")
    hop_length: int = described(
        160, "samples from one audio frame to the next; recipes write that of the feature extractor (hop_ms)"
    )

    # Series
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
        self.ngram_sizes = list(self.ngram_sizes)
        super().__post_init__(**kwargs)
        # The code is saved with every model, so an auto_map that points to another repository must be replaced.
        self.auto_map = {"AutoConfig": "configuration_bm_transformer.BmTransformerConfig", **self.heads}

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism cuts the matrices of the trunk, by the names that this shape has."""
        mlp = {"up_proj": "colwise", "down_proj": "rowwise"}
        if self.hidden_act == "swiglu":
            mlp["gate_proj"] = "colwise"
        attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
        if self.qk_norm:  # each process scales its own heads, and sees their part of the gradient
            attention |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
        sides: dict[str, tuple[str, ...]] = {"": ("self_attn",)}
        if self.is_encoder_decoder:
            sides = {"encoder.": ("self_attn",), "decoder.": ("self_attn", "cross_attn")}
        layers = {
            f"{side}layers.*.{block}.{name}": style
            for side, blocks in sides.items()
            for block, plan in (*((block, attention) for block in blocks), ("mlp", mlp))
            for name, style in plan.items()
        }
        if self.input_type != "tokens":
            return layers
        # An output layer that is tied to the table is cut in the same way: by tokens.
        return layers | {f"{side}stem.embed_tokens": "embedding_rowwise" for side in sides}

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """What is gathered together when weights are spread over processes: a layer; all else with the whole model."""
        sides = ("encoder.", "decoder.") if self.is_encoder_decoder else ("",)
        return {f"{side}layers.*": "free_full_weight" for side in sides}

    def validate_heads(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; each key head serves a whole group of query heads"
            )
        whole, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest and self.head_dim == whole:  # head_dim is the default; another value is intended
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

    def validate_ngrams(self):
        check_ngrams(self.ngram_sizes, self.ngram_skip, self.ngram_buckets, self.ngram_spelling)

    def validate_probabilities(self):
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; choose 0 <= {name} < 1")


def _default_mlp_width(hidden_size: int, *, gated: bool) -> int:
    """4 x width, or 8/3 x width (rounded up to a multiple of 8) for a gated MLP, whose third matrix costs as much."""
    return -(-8 * hidden_size // 3 // 8) * 8 if gated else 4 * hidden_size


__all__ = ["PRESETS", "BmTransformerConfig"]
