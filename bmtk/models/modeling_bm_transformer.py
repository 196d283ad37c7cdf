"""Transformer: attention mixes the positions.  B rows, L positions, D width, H query heads, G key heads, d head size.

Modern and classic by configuration: rotary (Su et al. 2021, arXiv:2104.09864), sinusoidal or learned positions;
RMSNorm (Zhang & Sennrich 2019) or LayerNorm, before (Xiong et al. 2020) or after (Vaswani et al. 2017) each sublayer;
SwiGLU (Shazeer 2020), GELU, ReLU or squared ReLU (So et al. 2021); grouped-query attention (Ainslie et al. 2023);
QK-norm.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    create_causal_mask,
    find_packed_sequence_indices,
    packed_sequence_mask_function,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_bm_transformer import BmTransformerConfig
from .heads_bm import CausalLMHead, SequenceClassificationHead
from .stems_bm import TokenStem, positions_from_mask


class BmRMSNorm(nn.RMSNorm):
    """RMSNorm that takes its weight in the input's type, as autocast feeds it 16-bit inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


NORMS = {"rms_norm": BmRMSNorm, "layer_norm": nn.LayerNorm}


class BmRotaryEmbedding(nn.Module):
    """position_ids (B, L) -> cosines and sines (B, 1, L, d); transformers' `_init_weights` rebuilds the buffers."""

    def __init__(self, config: BmTransformerConfig):
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
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + d/2]) of (B, H, L, d) by their angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out: query (B, H, L, d), key, value (B, G, S, d) -> (B, L, H, d) and weights (B, H, L, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def same_document_mask(position_ids: torch.Tensor):
    """Mask function of packed rows, whose position_ids (B, L) restart; None where none does.

    transformers' causal mask looks for packing by itself, its bidirectional mask does not.
    """
    documents = find_packed_sequence_indices(position_ids)
    return None if documents is None else packed_sequence_mask_function(documents)


class ResidualProjection(nn.Linear):
    """A projection whose output is added to the residual stream; its own class because it starts smaller."""


class BmTransformerAttention(nn.Module):
    def __init__(self, config: BmTransformerConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = config.is_causal
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = ResidualProjection(query_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = BmRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = BmRMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states, attention_mask=None, rotary=None, past_key_values: Cache | None = None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, H, L, d)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, G, L, d)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, G, past + L, d)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: BmTransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: BmTransformerConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = ResidualProjection(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class BmTransformerLayer(GradientCheckpointingLayer):
    """Attention and MLP on a residual stream.  Subclasses say where the norms stand."""

    def __init__(self, config: BmTransformerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = BmTransformerAttention(config, layer_idx)
        self.mlp = GatedMLP(config) if config.hidden_act == "swiglu" else PlainMLP(config)
        self.attention_norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.mlp_norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)


class PreNormLayer(BmTransformerLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class PostNormLayer(BmTransformerLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        return self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))


LAYERS = {"pre": PreNormLayer, "post": PostNormLayer}


class BmTransformerPreTrainedModel(PreTrainedModel):
    config: BmTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PreNormLayer", "PostNormLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": BmTransformerLayer, "attentions": BmTransformerAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); projections into the residual stream over sqrt(2 layers) (Radford et al. 2019)."""
        super()._init_weights(module)
        # By class, not from the layer: for code outside transformers, modules without own parameters are passed over.
        if isinstance(module, ResidualProjection):
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.stem.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.stem.embed_tokens = value


class BmTransformerModel(BmTransformerPreTrainedModel):
    """Stem, layers, and for pre-norm a last norm; returns `last_hidden_state` (B, L, D)."""

    def __init__(self, config: BmTransformerConfig):
        super().__init__(config)
        self.stem = TokenStem(config)
        self.layers = nn.ModuleList(LAYERS[config.norm_position](config, i) for i in range(config.num_hidden_layers))
        pre_norm = config.norm_position == "pre"
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps) if pre_norm else nn.Identity()
        self.rotary_emb = BmRotaryEmbedding(config) if config.position_embedding_type == "rotary" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.stem.embed(input_ids)
        same_document = None
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = positions_from_mask(attention_mask, inputs_embeds.shape[1], past, inputs_embeds.device)
        elif attention_mask is None and not self.config.is_causal:
            same_document = same_document_mask(position_ids.expand(len(inputs_embeds), -1))
        mask = create_causal_mask(  # bidirectional where config.is_causal is False
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            and_mask_function=same_document,
        )
        # An empty cache is made after the mask, because transformers looks for packing only where there is no cache.
        if use_cache and past_key_values is None and self.config.is_causal:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.stem(inputs_embeds, position_ids)
        rotary = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                rotary=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class BmTransformerForCausalLM(CausalLMHead, BmTransformerPreTrainedModel, GenerationMixin):
    trunk_class = BmTransformerModel


class BmTransformerForSequenceClassification(SequenceClassificationHead, BmTransformerPreTrainedModel):
    trunk_class = BmTransformerModel


__all__ = [
    "BmTransformerForCausalLM",
    "BmTransformerForSequenceClassification",
    "BmTransformerModel",
    "BmTransformerPreTrainedModel",
]
