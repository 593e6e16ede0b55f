"""Rows as a rectangle: so that the order can do arithmetic where shards end in short frames.

Every shard ends in a frame that may be short. Whole frames are counted first, in stored order; the
rows of the short frames follow, joined into frames of the usual number of rows. At most one frame
of the result is not full. The table holds a few numbers a shard, none a frame.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class RowTable:
    """Translates (frame, row) of the rectangle into (frame, row) as they are stored."""

    def __init__(self, shard_tokens: Indices, frame_tokens: int, context_tokens: int) -> None:
        """`shard_tokens` is the tokens of each shard of a split: shape (shards,)."""
        self.rows_per_frame = frame_tokens // context_tokens
        whole_frames = shard_tokens // frame_tokens
        left_tokens = shard_tokens % frame_tokens
        short_rows = -(-left_tokens // context_tokens)
        stored_frames = whole_frames + (left_tokens > 0)
        self._first_stored = _before(stored_frames)
        self._first_whole = _before(whole_frames)
        self._first_short_row = _before(short_rows)
        self._num_whole = int(whole_frames.sum())
        self._num_short_rows = int(short_rows.sum())
        self.num_frames = self._num_whole + -(-self._num_short_rows // self.rows_per_frame)
        self._whole_frames = whole_frames

    @property
    def num_rows(self) -> int:
        """Rows that hold tokens."""
        return self._num_whole * self.rows_per_frame + self._num_short_rows

    def locate(self, frame: Indices, row: Indices) -> tuple[Indices, Indices]:
        """Stored frame and row of each place. A place beyond the last row is a row past the end of
        the last short frame: it holds nothing."""
        is_whole = frame < self._num_whole
        shard = _shard_of(np.minimum(frame, self._num_whole - 1), self._first_whole)
        stored_whole = self._first_stored[shard] + frame - self._first_whole[shard]

        short_row = (frame - self._num_whole) * self.rows_per_frame + row
        last = max(self._num_short_rows - 1, 0)
        shard = _shard_of(np.clip(short_row, 0, last), self._first_short_row)
        stored_short = self._first_stored[shard] + self._whole_frames[shard]
        row_in_short = short_row - self._first_short_row[shard]
        return (
            np.where(is_whole, stored_whole, stored_short),
            np.where(is_whole, row, row_in_short),
        )


def _before(counts: Indices) -> Indices:
    """How many lie before each shard: shape (shards,)."""
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)


def _shard_of(index: Indices, first: Indices) -> Indices:
    # `right` skips shards without any: of equal firsts, the last is the one that has them.
    return np.searchsorted(first, index, side="right").astype(np.int64) - 1
