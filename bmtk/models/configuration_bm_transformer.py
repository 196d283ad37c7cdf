"""Configuration of the bm_transformer family: modern and classic Transformers by fields, not by classes."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class BmTransformerConfig(PreTrainedConfig):
    """What a bm_transformer is made of.

    The defaults describe a small modern decoder (rotary positions, pre-RMSNorm, SwiGLU).  `hidden_act="gelu"`,
    `position_embedding_type="learned"`, `norm_type="layer_norm"` and biases give GPT-2; `"sinusoidal"`, `"post"`,
    `"relu"` and `scale_embedding` give the Transformer of 2017.
    """

    model_type = "bm_transformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    # Auto class -> the class that serves it; read by bmtk.models.register and saved as `auto_map` with every model.
    heads: ClassVar[dict[str, str]] = {
        "AutoModel": "modeling_bm_transformer.BmTransformerModel",
        "AutoModelForCausalLM": "modeling_bm_transformer.BmTransformerForCausalLM",
        "AutoModelForSequenceClassification": "modeling_bm_transformer.BmTransformerForSequenceClassification",
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
    is_causal: bool = True  # False: every position sees every other (an encoder)
    scale_embedding: bool = False  # multiply token embeddings by sqrt(hidden_size)
    tie_word_embeddings: bool = True  # the output head shares the token embedding
    embedding_dropout: int | float = 0.0  # probability, on the sum of token and position embedding
    hidden_dropout: int | float = 0.0  # probability, on what attention and MLP add to the residual stream
    attention_dropout: int | float = 0.0  # probability, on attention weights
    classifier_dropout: int | float = 0.0  # probability, on what a classification head reads
    classifier_pooling: Literal["last", "mean"] | None = None  # None: last position if causal, else mean of positions
    initializer_range: int | float = 0.02  # standard deviation; projections into the residual are divided by sqrt(2L)
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = _default_mlp_width(self.hidden_size, gated=self.hidden_act == "swiglu")
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": self.rope_theta}
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

    def validate_probabilities(self):
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a probability; choose 0 <= {name} < 1")


def _default_mlp_width(hidden_size: int, *, gated: bool) -> int:
    """4 x width, or 8/3 x width (rounded up to a multiple of 8) for a gated MLP, whose third matrix costs as much."""
    return -(-8 * hidden_size // 3 // 8) * 8 if gated else 4 * hidden_size


__all__ = ["BmTransformerConfig"]
