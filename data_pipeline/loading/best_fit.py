"""Best-fit packing of documents into groups of rows: each document whole, in one row.

A group is consecutive documents that fill a fixed number of rows, so that the rows of a group need
few frames. Its first documents are placed by length, the longest first (best-fit decreasing:
Johnson, "Near-optimal bin packing algorithms", 1973), the last ones in stored order until one fits
no row. A document that is longer than a row takes one of its own.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

_SORTED_SHARE = 0.98
"""Share of a group's positions for which documents are placed by length. More would seldom fit."""
_SMALLER = 0.98


@dataclass(frozen=True)
class Group:
    """The next documents, and the row of each within the group."""

    lengths: Lengths
    """Tokens of each document, not cut: shape (documents,)."""
    rows: Lengths

    @property
    def num_rows(self) -> int:
        """Number of rows that hold documents."""
        return int(self.rows.max()) + 1


def packed_groups(
    lengths: Iterable[Lengths], context_tokens: int, rows_per_group: int
) -> Iterator[Group]:
    """Groups of all documents, in order; only the last one has empty rows. `lengths` are tokens."""
    waiting = np.empty(0, dtype=np.int64)
    enough = rows_per_group * context_tokens
    for some in lengths:
        waiting = np.concatenate([waiting, some.astype(np.int64)])
        positions = np.cumsum(np.minimum(waiting, context_tokens))
        taken = 0
        while len(positions) and positions[-1] - (positions[taken - 1] if taken else 0) > enough:
            group = _next_group(waiting[taken:], context_tokens, rows_per_group)
            yield group
            taken += len(group.lengths)
        waiting = waiting[taken:]
    while len(waiting):
        group = _next_group(waiting, context_tokens, rows_per_group)
        yield group
        waiting = waiting[len(group.lengths) :]


def _next_group(lengths: Lengths, context_tokens: int, rows_per_group: int) -> Group:
    """The most of the next documents that are placed in `rows_per_group` rows."""
    room = rows_per_group * context_tokens
    sizes = np.minimum(lengths[:room], context_tokens)
    positions = np.cumsum(sizes)
    sizes = sizes[: np.searchsorted(positions, room, side="right")]
    share = _SORTED_SHARE
    while True:
        number = int(np.searchsorted(positions, share * room, side="right"))
        packing = _Packing(context_tokens, rows_per_group)
        by_length = np.argsort(-sizes[:number], kind="stable")
        rows = np.empty(number, dtype=np.int64)
        placed = packing.place(sizes[by_length].tolist())
        if len(placed) == number:
            break
        share *= _SMALLER
    rows[by_length] = placed
    rest = packing.place(sizes[number:].tolist())
    number += len(rest)
    return Group(lengths[:number].copy(), np.concatenate([rows, np.array(rest, dtype=np.int64)]))


class _Packing:
    """Rows that are being filled."""

    def __init__(self, context_tokens: int, max_rows: int) -> None:
        self._context_tokens = context_tokens
        self._max_rows = max_rows
        self._num_rows = 0
        # Rows with room, sorted: room x max_rows + row.
        self._open: list[int] = []

    def place(self, sizes: list[int]) -> list[int]:
        """The row of each document up to the first that fits none: the fullest that it fits."""
        context_tokens, max_rows, rooms = self._context_tokens, self._max_rows, self._open
        num_rows = self._num_rows
        rows = []
        for size in sizes:
            found = bisect_left(rooms, size * max_rows)
            if found < len(rooms):
                key = rooms.pop(found)
                row = key % max_rows
                left = key - size * max_rows
            elif num_rows < max_rows:
                row, num_rows = num_rows, num_rows + 1
                left = (context_tokens - size) * max_rows + row
            else:
                break
            if left >= max_rows:
                insort(rooms, left)
            rows.append(row)
        self._num_rows = num_rows
        return rows
