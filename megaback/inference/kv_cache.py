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
        self._is_used_R = torch.zeros_like(self._rows_R)
        self.num_rows = num_rows
        self.capacity_tokens = capacity_tokens
        self.lengths: list[int] = []

    @property
    def positions(self) -> Tensor:
        """Positions of the rows' next tokens, their lengths, on the device: shape (B,)."""
        return self.positions_of(len(self.lengths))

    def positions_of(self, rows: int) -> Tensor:
        """`positions` of the first rows; 0 for unused ones."""
        return self._lengths_R[:rows]

    def add(self, state: Sequence[LayerState]) -> None:
        """Add a prefilled row. Raises ValueError if all rows are in use."""
        row, length = len(self.lengths), state[0][0].shape[1]
        if row == self.num_rows:
            raise ValueError(f"all {self.num_rows} rows are in use")
        for layer, (keys_KTE, values_KTE) in enumerate(state):
            self._keys[layer, row, :, :length] = keys_KTE
            self._values[layer, row, :, :length] = values_KTE
        self._lengths_R[row].fill_(length)  # an assignment would copy it from the host
        self._is_used_R[row].fill_(1)
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
        self._lengths_R[last].zero_()
        self._is_used_R[last].zero_()

    def view(self) -> CacheView:
        """Slots up to the longest row's next one; no mask if all rows have that length."""
        length = max(self.lengths)
        if min(self.lengths) < length:
            return self.masked_view(len(self.lengths), length + 1)
        every = slice(None)
        layers = self._layers(len(self.lengths), length + 1)
        return CacheView(layers, (every, every, length), None)

    def full_view(self) -> CacheView:
        """All slots, masked: a compiled step sees the same shape at every length."""
        return self.masked_view(len(self.lengths), self.capacity_tokens)

    def masked_view(self, rows: int, slots: int) -> CacheView:
        """The first slots of the first rows: depends on the device's numbers only.

        An unused row sees its first slot, and writes there.
        """
        lengths_B = self.positions_of(rows)
        visible = (self._slots_S[:slots] <= lengths_B[:, None])[:, None, None]
        place = (self._rows_R[:rows], slice(None), lengths_B)
        return CacheView(self._layers(rows, slots), place, visible)

    def advance(self) -> None:
        """Count a token per row, after it was written at the place of a view."""
        self.positions.add_(1)
        self.count_token()

    def advance_on_device(self, rows: int) -> None:
        """The device's part of `advance`, for those of the first rows that are in use."""
        self._lengths_R[:rows].add_(self._is_used_R[:rows])

    def count_token(self) -> None:
        """The host's part of `advance`."""
        self.lengths = [length + 1 for length in self.lengths]

    def _layers(self, rows: int, stop: int) -> list[LayerState]:
        keys, values = self._keys[:, :rows, :, :stop], self._values[:, :rows, :, :stop]
        return list(zip(keys.unbind(), values.unbind(), strict=True))
