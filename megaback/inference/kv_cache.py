"""KV cache for a changing set of rows: a new token costs one position per row.

Memory is allocated once, for all rows and the whole context. A row's tokens begin at its first slot
and continue by its own length, so other rows never move them. Rows in use are the first ones: when
one is removed, the last takes its place.

Shapes: R rows, B of them in use, K key and value heads, S slots, E head dimension, T tokens of a
row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LayerState = tuple[Tensor, Tensor]
"""One layer's keys and values of one row: each of shape (K, T, E)."""


@dataclass(frozen=True)
class CacheView:
    """The part of the cache that a step over all rows reads and writes."""

    layers: list[LayerState]
    """Each layer's keys and values up to the current token: each of shape (B, K, S, E)."""
    place: tuple[Any, Any, Any]
    """Index in these of the token's keys and values, of shape (B, K, E)."""
    visible: Tensor | None
    """Slots that belong to each row: (B, 1, 1, S); None if all do."""


class KeyValueCache:
    """All layers' keys and values of up to `num_rows` rows, and the length of each in tokens."""

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        kv_heads: int,
        capacity_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_rows, kv_heads, capacity_tokens, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._slots_S = torch.arange(capacity_tokens, device=device)
        self._rows_R = torch.arange(num_rows, device=device)
        # Also on the device, so that a step need not send them.
        self._lengths_R = torch.zeros_like(self._rows_R)
        self.num_rows = num_rows
        self.capacity_tokens = capacity_tokens
        self.lengths: list[int] = []

    @property
    def positions(self) -> Tensor:
        """Positions of the rows' next tokens, their lengths, on the device: shape (B,)."""
        return self._lengths_R[: len(self.lengths)]

    def add(self, state: Sequence[LayerState]) -> None:
        """Add a prefilled row. Raises ValueError if all rows are in use."""
        row, length = len(self.lengths), state[0][0].shape[1]
        if row == self.num_rows:
            raise ValueError(f"all {self.num_rows} rows are in use")
        for layer, (keys_KTE, values_KTE) in enumerate(state):
            self._keys[layer, row, :, :length] = keys_KTE
            self._values[layer, row, :, :length] = values_KTE
        self._lengths_R[row].fill_(length)  # an assignment would copy it from the host
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if row != last:
            self._keys[:, row, :, :length] = self._keys[:, last, :, :length]
            self._values[:, row, :, :length] = self._values[:, last, :, :length]
            self._lengths_R[row].fill_(length)
            self.lengths[row] = length

    def view(self) -> CacheView:
        """Slots up to the longest row's next one; no mask if all rows have that length."""
        length = max(self.lengths)
        if min(self.lengths) < length:
            return self._masked(length + 1)
        every = slice(None)
        return CacheView(self._layers(length + 1), (every, every, length), None)

    def full_view(self) -> CacheView:
        """All slots, masked: a compiled step sees the same shape at every length."""
        return self._masked(self.capacity_tokens)

    def advance(self) -> None:
        """Count a token per row, after it was written at the place of `view`."""
        self.positions.add_(1)
        self.lengths = [length + 1 for length in self.lengths]

    def _masked(self, stop: int) -> CacheView:
        lengths_B = self.positions
        visible = (self._slots_S[:stop] <= lengths_B[:, None])[:, None, None]
        rows_B = self._rows_R[: len(lengths_B)]
        return CacheView(self._layers(stop), (rows_B, slice(None), lengths_B), visible)

    def _layers(self, stop: int) -> list[LayerState]:
        rows = len(self.lengths)
        keys, values = self._keys[:, :rows, :, :stop], self._values[:, :rows, :, :stop]
        return list(zip(keys.unbind(), values.unbind(), strict=True))
