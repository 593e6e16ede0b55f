"""Keys and values of what a sampler has read, so that each new token costs one position.

Fixed size, one sequence. Shapes: T new tokens, H query heads, K key and value heads, E head
dimension.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor


class LayerCache:
    """One layer's keys and values, in order of position."""

    def __init__(self, capacity_tokens: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        shape = (kv_heads, capacity_tokens, head_dim)
        self._key_KTE = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._value_KTE = torch.empty_like(self._key_KTE)
        self.length = 0

    def attend(self, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
        """Append keys and values; attend from the new queries to everything before and themselves.

        Either fills an empty cache with many tokens or lengthens it by one.
        """
        num_new = len(query_THE)
        stop = self.length + num_new
        self._key_KTE[:, self.length : stop] = key_TKE.transpose(0, 1)
        self._value_KTE[:, self.length : stop] = value_TKE.transpose(0, 1)
        is_first = self.length == 0
        self.length = stop
        groups = query_THE.shape[1] // key_TKE.shape[1]
        attended_HTE = F.scaled_dot_product_attention(
            query_THE.transpose(0, 1)[None],
            self._key_KTE[:, :stop].repeat_interleave(groups, dim=0)[None],
            self._value_KTE[:, :stop].repeat_interleave(groups, dim=0)[None],
            is_causal=is_first and num_new > 1,
        )[0]
        return attended_HTE.transpose(0, 1)


class KeyValueCache:
    """The caches of all layers."""

    def __init__(
        self, num_layers: int, capacity_tokens: int, kv_heads: int, head_dim: int, like: Tensor
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.layers = [
            LayerCache(capacity_tokens, kv_heads, head_dim, like) for _ in range(num_layers)
        ]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def clear(self) -> None:
        for layer in self.layers:
            layer.length = 0
