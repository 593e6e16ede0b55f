"""Instruction examples in rows: their storage, and the per-token marks of rows that are read.

An example never crosses the boundary of a row of `row_tokens` ids; end markers fill the rest. A
shard stores for each example its number of ids (including the padding after it), of ids without
loss, and of ids with loss. From these follow the marks of every id: whether an attention segment
begins there, and whether the id after it is a target.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.text.encoder import Ids

HAS_LOSS = np.uint8(1)
"""The id after this one, in the same example, is a target."""
STARTS = np.uint8(2)
"""A segment begins here: an example, or padding."""
NUM_COUNTS = 3
"""Numbers stored per example: ids with padding, ids without loss, ids with loss."""

Marks = npt.NDArray[np.uint8]

_BLOCK_EXAMPLES = 1 << 20
"""Examples checked at once, which bounds memory."""


@dataclass(frozen=True)
class PackedExample:
    """An example as stored, padding included."""

    ids: Ids
    num_given: int
    num_loss_tokens: int
    text_bytes: int


def require_rows(counts: npt.NDArray[np.integer[Any]], row_tokens: int) -> None:
    """Raises ValueError if an example with these counts, shape (examples, 3), crosses a row."""
    start = 0
    for first in range(0, len(counts), _BLOCK_EXAMPLES):
        tokens, given, loss_tokens = counts[first : first + _BLOCK_EXAMPLES].astype(np.int64).T
        stops = start + np.cumsum(tokens)
        if (
            (given < 1).any()
            or (given + loss_tokens > tokens).any()
            or ((stops - tokens) // row_tokens != (stops - 1) // row_tokens).any()
        ):
            raise ValueError("an example crosses a row's end, or its counts contradict each other")
        start = int(stops[-1])


class ExampleMarks:
    """The marks of the ids of one shard."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        """`counts` has shape (examples, 3), and has passed `require_rows`."""
        tokens, given, loss_tokens = counts.T
        self._starts = np.cumsum(tokens) - tokens
        self._loss_from = self._starts + given - 1
        self._ends = self._starts + given + loss_tokens
        self._padding = self._ends[given + loss_tokens < tokens]

    def between(self, start: int, stop: int) -> Marks:
        """Marks of the ids from `start` to `stop` of the shard; no example may cross these."""
        first, last = np.searchsorted(self._starts, [start, stop])
        edges = np.zeros(stop - start + 1, dtype=np.int8)
        # Within an example, from the last id without loss to the last id but one.
        edges[self._loss_from[first:last] - start] += 1
        edges[self._ends[first:last] - 1 - start] -= 1
        marks = np.cumsum(edges[:-1], dtype=np.int8).astype(np.uint8) * HAS_LOSS
        marks[self._starts[first:last] - start] |= STARTS
        first, last = np.searchsorted(self._padding, [start, stop])
        marks[self._padding[first:last] - start] |= STARTS
        return marks
