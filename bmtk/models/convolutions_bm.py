"""One-dimensional convolutions over positions, causal or not, with a cache.  B rows, L positions, D width, k taps.

A convolution is computed as one matrix product with the weights of all taps; the products are shifted, masked and
added.  A tap that reads `offset` positions away is masked where the later of the two positions is fewer than `offset`
positions into its document.  So a row may have several documents (position_ids restart) and padding at any place
(masked positions are zeros, like those beyond the ends of a row).

Sources: several widths, Kim 2014, arXiv:1408.5882; gated, van den Oord et al. 2016 (WaveNet), arXiv:1609.03499;
residual, Bai et al. 2018 (TCN), arXiv:1803.01271, here with a norm before it instead of weight norm within, and no
ReLU after the second convolution and the sum.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from .dropout_bm import BmDropout
from .kaiming_bm import KaimingLinear
from .trunk_layer_bm import TrunkLayer

NORMS = {"layer_norm": nn.LayerNorm, "none": lambda width, eps: nn.Identity()}


class Convolution(nn.Module):
    """(B, L, inputs) -> (B, L, outputs), the weight of tap j being `taps.weight[j * outputs : (j + 1) * outputs]`.

    If causal, the last tap reads the position itself; otherwise the taps are centred on it, as with torch's
    padding="same".
    """

    def __init__(self, inputs: int, outputs: int, *, kernel_size: int, dilation: int, is_causal: bool, scale=1.0):
        super().__init__()
        fan_in = kernel_size * inputs
        self.taps = KaimingLinear(inputs, kernel_size * outputs, bias=False, fan_in=fan_in, scale=scale)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.kernel_size, self.outputs = kernel_size, outputs
        self.span = (kernel_size - 1) * dilation  # earlier positions that a causal convolution remembers
        before = self.span if is_causal else self.span // 2
        self.offsets = [tap * dilation - before for tap in range(kernel_size)]

    @property
    def state_size(self) -> int:
        return self.span * (self.kernel_size - 1) * self.outputs

    def forward(self, x, position_ids=None, mask=None, past=None, *, with_state: bool = False):
        """The output and, if `with_state`, the state (B, state_size) after it; `past` is the state before.

        position_ids (B or 1, L) restart at each document; mask (B, L, 1) is 0 at padding.
        """
        if mask is not None:
            x = x * mask
        taps = self.taps(x).unflatten(-1, (self.kernel_size, self.outputs))  # (B, L, k, outputs)
        if past is not None:
            past = past.view(x.shape[0], self.span, self.kernel_size - 1, self.outputs)
            taps = torch.cat((F.pad(past, (0, 0, 0, 1)), taps), dim=1)  # the last tap reads no earlier position
        y = self.bias.to(taps.dtype).expand(*x.shape[:2], -1)
        for tap, offset in enumerate(self.offsets):
            if abs(offset) < taps.shape[1]:
                y = y + cut(shift(taps[:, :, tap], offset, x.shape[1]), position_ids, offset)
        if not with_state:
            return y, None
        return y, F.pad(taps[:, :, :-1], (0, 0, 0, 0, self.span - taps.shape[1], 0)).flatten(1)


def shift(x: torch.Tensor, offset: int, length: int) -> torch.Tensor:
    """The last `length` of (B, past + length, D), each from `offset` positions later; 0 beyond the ends."""
    return F.pad(x, (0, 0, length - x.shape[1] - offset, offset))


def cut(x: torch.Tensor, position_ids: torch.Tensor | None, offset: int) -> torch.Tensor:
    """x (B, L, D), with 0 where the value from `offset` positions away belongs to another document."""
    if position_ids is None or offset == 0:
        return x
    later = position_ids if offset < 0 else F.pad(position_ids, (-offset, offset))
    return torch.where((later >= abs(offset))[..., None], x, 0)


class ConvolutionCacheLayer(CacheLayerMixin):
    """The states of one layer's convolutions, concatenated in `keys` (B, sum of sizes); `values` stays empty.

    Setting `_layer_type` registers it: `DynamicCache(config=...)` creates one for each entry of `config.layer_types`.
    """

    _layer_type = "bm_convolution"
    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False
    keys: torch.Tensor  # these are set by the first update, as in transformers' own layers
    values: torch.Tensor
    dtype: torch.dtype
    device: torch.device
    is_initialized: bool

    def __init__(self, **kwargs):  # StaticCache passes max_cache_len, which a state does not need
        super().__init__()
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, num_positions: int, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        self.cumulative_length += num_positions
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("the state of a convolution cannot be rolled back: it holds the latest positions only")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


STATIC_LAYER_TYPE_MAPPING[ConvolutionCacheLayer._layer_type] = (
    ConvolutionCacheLayer  # states have a fixed size, so the static cache uses them too
)


class ConvolutionLayer(TrunkLayer, GradientCheckpointingLayer):
    """(B, L, D) and the sum of skips -> the same two.  Subclasses define convolutions and combine them in `mix`."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)
        self.dropout = BmDropout(config.hidden_dropout)

    def forward(
        self, hidden_states, skips, position_ids=None, mask=None, past_key_values: Cache | None = None, **kwargs
    ):
        if past_key_values is None:
            return self.mix(hidden_states, skips, lambda conv, x: conv(x, position_ids, mask)[0])
        layer = past_key_values.layers[self.layer_idx]
        convolutions = [module for module in self.modules() if isinstance(module, Convolution)]
        pasts = [None] * len(convolutions)
        if layer.get_seq_length():
            pasts = layer.keys.split([conv.state_size for conv in convolutions], dim=1)
        pasts, states = dict(zip(convolutions, pasts, strict=True)), {}

        def convolve(conv, x):
            y, states[conv] = conv(x, position_ids, mask, pasts[conv], with_state=True)
            return y

        outputs = self.mix(hidden_states, skips, convolve)
        state = torch.cat([states[conv] for conv in convolutions], dim=1)
        past_key_values.update(state, state[:, :0], self.layer_idx, hidden_states.shape[1])
        return outputs


def dilation_of(config, layer_idx: int) -> int:
    """1, 2, 4, ..., and from 1 again after `dilation_cycle` layers."""
    return 2 ** (layer_idx % config.dilation_cycle)


class ResidualConvolutionLayer(ConvolutionLayer):
    """x + second(act(first(norm(x)))), both dilated."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        shape = {"kernel_size": config.kernel_size, "dilation": dilation_of(config, layer_idx)}
        self.first = Convolution(width, width, is_causal=config.is_causal, **shape)
        scale = (
            config.num_hidden_layers**-0.5
        )  # keeps the residual sum's variance independent of depth (Radford et al. 2019)
        self.second = Convolution(width, width, is_causal=config.is_causal, scale=scale, **shape)
        self.act = ACT2FN[config.hidden_act]

    def mix(self, x, skips, convolve):
        y = self.dropout(self.act(convolve(self.first, self.norm(x))))
        return x + self.dropout(convolve(self.second, y)), skips


class GatedConvolutionLayer(ConvolutionLayer):
    """z = tanh(f(x)) * sigmoid(g(x)) by one dilated convolution; x + residual(z), and skips + skip(z).

    The last layer has no residual branch, because only its skip is read.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        shape = {"kernel_size": config.kernel_size, "dilation": dilation_of(config, layer_idx)}
        self.filter_and_gate = Convolution(width, 2 * width, is_causal=config.is_causal, **shape)
        start = {
            "gain": 1.0,
            "scale": config.num_hidden_layers**-0.5,
        }  # both are summed over all layers, so each gets 1 / layers of the variance
        self.skip = KaimingLinear(width, width, **start)
        is_last = layer_idx == config.num_hidden_layers - 1
        self.residual = None if is_last else KaimingLinear(width, width, **start)

    def mix(self, x, skips, convolve):
        filtered, gate = convolve(self.filter_and_gate, self.norm(x)).chunk(2, dim=-1)
        z = self.dropout(filtered.tanh() * gate.sigmoid())
        x = x if self.residual is None else x + self.residual(z)
        return x, self.skip(z) if skips is None else skips + self.skip(z)


class MultiWidthLayer(ConvolutionLayer):
    """Parallel filters of several widths: act(conv(norm(x))) of each, an equal share of the hidden size."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        share = config.hidden_size // len(config.filter_widths)
        self.filters = nn.ModuleList(
            Convolution(config.hidden_size, share, kernel_size=width, dilation=1, is_causal=config.is_causal)
            for width in config.filter_widths
        )
        self.act = ACT2FN[config.hidden_act]

    def mix(self, x, skips, convolve):
        x = self.norm(x)
        y = torch.cat([convolve(conv, x) for conv in self.filters], dim=-1)
        return self.dropout(self.act(y)), skips


LAYERS = {"residual": ResidualConvolutionLayer, "gated": GatedConvolutionLayer, "multi_width": MultiWidthLayer}


class ClosingNorm(nn.Module):
    """Norm of the last layer's output."""

    def __init__(self, config):
        super().__init__()
        self.norm = NORMS[config.norm_type](config.hidden_size, eps=config.norm_eps)

    def forward(self, hidden_states: torch.Tensor, skips: None) -> torch.Tensor:
        return self.norm(hidden_states)


class ClosingSkips(nn.Module):
    """ReLU, linear layer and ReLU on the sum of skips (WaveNet, section 2.4)."""

    def __init__(self, config):
        super().__init__()
        self.linear = KaimingLinear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, skips: torch.Tensor) -> torch.Tensor:
        return self.linear(skips.relu()).relu()


CLOSINGS = {"residual": ClosingNorm, "gated": ClosingSkips, "multi_width": ClosingNorm}


__all__ = [
    "CLOSINGS",
    "LAYERS",
    "Convolution",
    "ConvolutionCacheLayer",
    "ConvolutionLayer",
]
