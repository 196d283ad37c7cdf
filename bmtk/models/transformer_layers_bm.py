"""Layers of the Transformer.  B rows, L positions, S source positions, D width, H query and G key heads, d head size.

Rotary positions: Su et al. 2021, arXiv:2104.09864.  RMSNorm: Zhang & Sennrich 2019; norms before (Xiong et al. 2020)
or after (Vaswani et al. 2017) each sublayer.  SwiGLU: Shazeer 2020; squared ReLU: So et al. 2021; grouped queries:
Ainslie et al. 2023.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN, ReLUSquaredActivation
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_bm import CPUAttention, fits_cpu_attention
from .dropout_bm import BmDropout
from .eager_cpu_bm import is_eager_on_cpu, is_unhooked
from .normed_mlp_bm import NormedMLP, fits_normed_mlp
from .norms_bm import NORMS, BmRMSNorm
from .products_bm import project
from .recomputed_activations_bm import SquaredReLU, SwiGLU, gated_product
from .rotary_bm import rotate


class BmRotaryEmbedding(nn.Module):
    """position_ids (B, L) -> cosines and sines (B, 1, L, d); transformers' `_init_weights` rebuilds the buffers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings

    @staticmethod
    def compute_default_rope_parameters(config, **kwargs):  # the signature transformers calls
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if is_eager_on_cpu(position_ids) and bool((position_ids == position_ids[:1]).all()):
            position_ids = position_ids[:1]  # the same for every row
        # In float32: bfloat16 represents integers exactly only up to 256, so later positions would share angles.
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Unfused attention: query (B, H, L, d), key, value (B, G, S, d) -> (B, L, H, d) and weights (B, H, L, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask  # the lowest number of the dtype where attention is masked, else 0
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # 16 bits would round the sum of exponentials
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ResidualProjection(nn.Linear):
    """A projection whose output is added to the residual stream; a class of its own for its smaller initial weights.

    Its layer cannot initialize it: transformers skips modules of custom code that own no parameters.
    """


class BmTransformerAttention(nn.Module):
    """Every position of (B, L, D) attends to positions of the same row."""

    def __init__(self, config, layer_idx: int, *, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5  # gives a product of two unit-variance heads unit variance
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = ResidualProjection(query_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = BmRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = BmRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states, attention_mask=None, rotary=None, past_key_values: Cache | None = None, **kwargs):
        query, (key, value) = self.query(hidden_states), self.key_and_value(hidden_states)
        if rotary is not None:  # before the cache, which holds rotated keys: a key's position never changes
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, G, past + L, d)
        return self.attend(query, key, value, attention_mask, **kwargs)

    def query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.q_norm(self.split(project(self.q_proj, hidden_states))).transpose(1, 2)  # (B, H, L, d)

    def key_and_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.k_norm(self.split(project(self.k_proj, hidden_states)))
        return key.transpose(1, 2), self.split(project(self.v_proj, hidden_states)).transpose(1, 2)  # (B, G, L, d)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        dropout = self.config.attention_dropout if self.training else 0.0
        is_fused = self.config._attn_implementation == "sdpa"
        if is_fused and fits_cpu_attention(query, key, value, attention_mask, dropout):
            output = CPUAttention.apply(query, key, value, self.is_causal, self.scaling)
            return project(self.o_proj, output.transpose(1, 2).flatten(2)), None
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = function(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return project(self.o_proj, output.flatten(2)), weights


class BmTransformerCrossAttention(BmTransformerAttention):
    """Attends to a source (B, S, D); its keys and values are projected once and then read from the cache."""

    def forward(self, hidden_states, source, attention_mask=None, past_key_values: EncoderDecoderCache | None = None):
        if past_key_values is None:
            key, value = self.key_and_value(source)
        elif past_key_values.is_updated.get(self.layer_idx):
            kept = past_key_values.cross_attention_cache.layers[self.layer_idx]
            key, value = kept.keys, kept.values
        else:
            key, value = self.key_and_value(source)
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return self.attend(self.query(hidden_states), key, value, attention_mask)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, gated_product(project(self.gate_proj, x), project(self.up_proj, x)))


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, self.act(project(self.up_proj, x)))


def mlp_of_norm(mlp: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`mlp(norm(x))`."""
    if type(mlp) is GatedMLP:
        activation, layers, others = SwiGLU, (mlp.down_proj, mlp.gate_proj, mlp.up_proj), (mlp,)
    elif type(mlp) is PlainMLP and type(mlp.act) is ReLUSquaredActivation:
        activation, layers, others = SquaredReLU, (mlp.down_proj, mlp.up_proj), (mlp, mlp.act)
    else:
        return mlp(norm(x))
    if not (all(map(is_unhooked, others)) and fits_normed_mlp(x, norm, layers)):
        return mlp(norm(x))
    return NormedMLP.apply(x, norm.weight, norm.eps, activation, *(layer.weight for layer in layers))


def norm_of_sublayer(config) -> nn.Module:
    norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
    if isinstance(norm, BmRMSNorm):
        norm.feeds_products = config.norm_position == "pre"  # else it is the residual stream itself
    return norm


def added(hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The sum.  On a CPU torch would first make a copy of an update of 16 bits, to which the stream is added here."""
    dtypes = hidden_states.dtype, update.dtype
    if dtypes == (torch.float32, torch.bfloat16) and is_eager_on_cpu(hidden_states, update):
        return update.float().add_(hidden_states)
    return hidden_states + update


class BmTransformerLayer(GradientCheckpointingLayer):
    """Attention and MLP on a residual stream.  Subclasses place the norms before or after each of them."""

    def __init__(self, config, layer_idx: int, *, is_causal: bool):
        super().__init__()
        self.self_attn = BmTransformerAttention(config, layer_idx, is_causal=is_causal)
        self.mlp = GatedMLP(config) if config.hidden_act == "swiglu" else PlainMLP(config)
        self.attention_norm = norm_of_sublayer(config)
        self.mlp_norm = norm_of_sublayer(config)
        self.dropout = BmDropout(config.hidden_dropout)


class PreNormLayer(BmTransformerLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.attention_norm(hidden_states), **kwargs)
        hidden_states = added(hidden_states, self.dropout(attended))
        return added(hidden_states, self.dropout(mlp_of_norm(self.mlp, self.mlp_norm, hidden_states)))


class PostNormLayer(BmTransformerLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = self.attention_norm(added(hidden_states, self.dropout(attended)))
        return self.mlp_norm(added(hidden_states, self.dropout(self.mlp(hidden_states))))


class BmTransformerDecoderLayer(BmTransformerLayer):
    """A layer with cross-attention to a source (B, S, D) between self-attention and MLP.

    The source is a positional argument, because reentrant checkpointing drops the gradients of keyword arguments.
    The cache holds the keys and values of both attentions.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx, is_causal=True)
        self.cross_attn = BmTransformerCrossAttention(config, layer_idx, is_causal=False)
        self.cross_norm = norm_of_sublayer(config)


class PreNormDecoderLayer(BmTransformerDecoderLayer):
    def forward(self, hidden_states, source, *, source_mask=None, past_key_values=None, **kwargs) -> torch.Tensor:
        own = own_cache(past_key_values)
        attended, _ = self.self_attn(self.attention_norm(hidden_states), past_key_values=own, **kwargs)
        hidden_states = added(hidden_states, self.dropout(attended))
        attended, _ = self.cross_attn(self.cross_norm(hidden_states), source, source_mask, past_key_values)
        hidden_states = added(hidden_states, self.dropout(attended))
        return added(hidden_states, self.dropout(mlp_of_norm(self.mlp, self.mlp_norm, hidden_states)))


class PostNormDecoderLayer(BmTransformerDecoderLayer):
    def forward(self, hidden_states, source, *, source_mask=None, past_key_values=None, **kwargs) -> torch.Tensor:
        own = own_cache(past_key_values)
        attended, _ = self.self_attn(hidden_states, past_key_values=own, **kwargs)
        hidden_states = self.attention_norm(added(hidden_states, self.dropout(attended)))
        attended, _ = self.cross_attn(hidden_states, source, source_mask, past_key_values)
        hidden_states = self.cross_norm(added(hidden_states, self.dropout(attended)))
        return self.mlp_norm(added(hidden_states, self.dropout(self.mlp(hidden_states))))


def own_cache(past_key_values: EncoderDecoderCache | None) -> Cache | None:
    return None if past_key_values is None else past_key_values.self_attention_cache


LAYERS = {"pre": PreNormLayer, "post": PostNormLayer}
DECODER_LAYERS = {"pre": PreNormDecoderLayer, "post": PostNormDecoderLayer}


__all__ = [
    "DECODER_LAYERS",
    "LAYERS",
    "NORMS",
    "BmRotaryEmbedding",
    "BmTransformerAttention",
    "BmTransformerCrossAttention",
    "BmTransformerDecoderLayer",
    "BmTransformerLayer",
    "ResidualProjection",
]
