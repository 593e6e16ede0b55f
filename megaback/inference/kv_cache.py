"""Keys and values of what a decoder has read, so that each new token costs one position a row.

Memory is laid out once, for all rows and the whole context. A row's tokens end at `stop`, which all
rows share, and begin wherever their number lets them: so a step writes one slot for all rows, and
rows of different lengths need a mask. (For rows that come and go, see `slots.py`.)

Shapes: B rows, K key and value heads, S slots, E head dimension, T tokens of one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

LayerState = tuple[Tensor, Tensor]
"""One layer's keys and values of one row: each of shape (K, T, E)."""


@dataclass(frozen=True)
class Reach:
    """What a step over all rows reads and writes."""

    layers: list[LayerState]
    """Each layer's keys and values up to the token at hand: each of shape (B, K, S, E)."""
    place: tuple[Any, Any, Any]
    """Where in these the token's keys and values go: an index that leaves (B, K, E)."""
    visible: Tensor | None
    """Which slots belong to each row: (B, 1, 1, S); None if all do."""


class Cache(Protocol):
    """What a decoder's step needs of a cache."""

    lengths: list[int]
    """How many tokens each row has read."""

    def reach(self) -> Reach: ...

    def advance(self) -> None:
        """Count a token of every row, written where `reach` said."""


class KeyValueCache:
    """All layers' keys and values, and how many tokens each row has read."""

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
        self.capacity_tokens = capacity_tokens
        self.lengths = [0] * num_rows
        self.stop = 0
        self._visible_BS: Tensor | None = None

    @property
    def layers(self) -> list[LayerState]:
        """Each layer's keys and values of all rows: each of shape (B, K, S, E)."""
        return list(zip(self._keys.unbind(), self._values.unbind(), strict=True))

    def row(self, row: int) -> list[LayerState]:
        """Copies of what a row has read."""
        window = slice(self.stop - self.lengths[row], self.stop)
        return [
            (keys[row, :, window].clone(), values[row, :, window].clone())
            for keys, values in self.layers
        ]

    def fill(self, rows: Sequence[list[LayerState]]) -> None:
        """Put what each row has read in its place; rows beyond these are given up."""
        self._keys, self._values = self._keys[:, : len(rows)], self._values[:, : len(rows)]
        self.lengths = [row[0][0].shape[1] for row in rows]
        self.stop = max(self.lengths)
        for number, row in enumerate(rows):
            window = slice(self.stop - self.lengths[number], self.stop)
            for (keys, values), (row_keys, row_values) in zip(self.layers, row, strict=True):
                keys[number, :, window] = row_keys
                values[number, :, window] = row_values
        self._visible_BS = None
        if min(self.lengths) < self.stop:
            begins_B = self.stop - torch.tensor(self.lengths, device=self._slots_S.device)
            self._visible_BS = self._slots_S >= begins_B[:, None]

    def reach(self) -> Reach:
        stop = self.stop + 1
        layers = [(keys[:, :, :stop], values[:, :, :stop]) for keys, values in self.layers]
        every = slice(None)
        return Reach(layers, (every, every, self.stop), self.visible(stop))

    def advance(self) -> None:
        """Count a token that was written at `stop` of every row."""
        self.stop += 1
        self.lengths = [length + 1 for length in self.lengths]

    def visible(self, stop: int) -> Tensor | None:
        """Which of the slots before `stop` belong to each row: (B, 1, 1, stop); None if all do."""
        return None if self._visible_BS is None else self._visible_BS[:, None, None, :stop]

    def visible_of_all(self) -> Tensor:
        """Which of all slots each row sees at `stop`: shape (1 or B, 1, 1, S)."""
        written_BS = (self._slots_S <= self.stop)[None]
        if self._visible_BS is not None:
            written_BS = written_BS & self._visible_BS
        return written_BS[:, None, None]
