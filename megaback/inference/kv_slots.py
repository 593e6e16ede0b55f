"""Keys and values of rows that come and go while others are being written.

A row's tokens begin at its first slot and go on by its own length, so that what one row has read
never moves for the sake of another. Rows in use are the first ones: when one leaves, the last takes
its place.

Shapes: B rows in use, K key and value heads, S slots, E head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaback.inference.decoder import Decoder
from megaback.inference.kv_cache import LayerState, Reach


class SlotCache:
    """Room for a fixed number of rows of the whole context."""

    def __init__(self, decoder: Decoder, num_slots: int) -> None:
        shape = decoder.shape
        size = (
            shape.num_layers,
            num_slots,
            shape.kv_heads,
            decoder.context_tokens,
            shape.head_dim,
        )
        self._keys = torch.zeros(size, dtype=decoder.cache_dtype, device=decoder.device)
        self._values = torch.zeros_like(self._keys)
        self._slots_S = torch.arange(decoder.context_tokens, device=decoder.device)
        self.num_slots = num_slots
        self.lengths: list[int] = []

    def add(self, state: Sequence[LayerState]) -> None:
        """Give a row that has been read the next place."""
        if len(self.lengths) == self.num_slots:
            raise ValueError(f"all {self.num_slots} places are taken")
        self.lengths.append(0)
        self.replace(len(self.lengths) - 1, state)

    def replace(self, row: int, state: Sequence[LayerState]) -> None:
        """Let a row have read this and nothing else."""
        length = state[0][0].shape[1]
        for layer, (keys_KTE, values_KTE) in enumerate(state):
            self._keys[layer, row, :, :length] = keys_KTE
            self._values[layer, row, :, :length] = values_KTE
        self.lengths[row] = length

    def remove(self, row: int) -> None:
        """Give a place up; the last row moves there."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if row != last:
            self._keys[:, row, :, :length] = self._keys[:, last, :, :length]
            self._values[:, row, :, :length] = self._values[:, last, :, :length]
            self.lengths[row] = length

    def reach(self) -> Reach:
        rows, stop = len(self.lengths), max(self.lengths) + 1
        lengths_B = torch.tensor(self.lengths, device=self._slots_S.device)
        rows_B = torch.arange(rows, device=self._slots_S.device)
        keys, values = self._keys[:, :rows, :, :stop], self._values[:, :rows, :, :stop]
        visible: Tensor | None = None
        if min(self.lengths) < stop - 1:
            visible = (self._slots_S[:stop] <= lengths_B[:, None])[:, None, None]
        layers = list(zip(keys.unbind(), values.unbind(), strict=True))
        return Reach(layers, (rows_B, slice(None), lengths_B), visible)

    def advance(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]
