"""The cache of a recurrent network: one state for each layer, of constant size.  B rows, U units."""

import torch
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin


class RecurrentState(CacheLayerMixin):
    """One layer's state: `keys` (B, U) is the hidden state, `values` the LSTM's cell, (B, 0) for other cells.

    transformers creates one for every `bm_recurrent` entry of `config.layer_types`.
    """

    _layer_type = "bm_recurrent"
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
        self.cumulative_length = 0  # tokens read so far; the name that the base class resets

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.keys, self.values) if self.is_initialized else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states, value_states, num_tokens: int, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        self.cumulative_length += num_tokens
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError(
                f"crop({tokens_to_remove}): a recurrent state cannot be rolled back; read the row again"
            )

    def offload(self) -> None:
        """Stay on the device: a state is too small to be worth moving."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values = (state.repeat_interleave(repeats, dim=0) for state in (self.keys, self.values))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


STATIC_LAYER_TYPE_MAPPING[RecurrentState._layer_type] = (
    RecurrentState  # a state has a fixed size, so the static cache uses it too
)

__all__ = ["RecurrentState"]
