"""Row grid: maps the rows of shards, which end in short frames, to a rectangle.

The order needs frames of equal length, but the last frame of a shard may be short. The rows of
whole frames are counted first, in stored order, then those of the short frames, and the sequence is
cut into frames of equal length: of the stored length in a large data set, so that a frame of the
rectangle is a frame of a file; of a slightly shorter one in a small data set, so that few places of
the rectangle are empty. The table has a few numbers per shard, and none per frame.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

_LARGE_FRAMES = 64  # with as many frames, the empty places of the last one are below 1/64


class RowGrid:
    """Translates (frame, row) of the rectangle into (frame, row) as stored, and back."""

    def __init__(self, shard_tokens: Indices, frame_tokens: int, context_tokens: int) -> None:
        """`shard_tokens` is the number of tokens of each shard of a split: shape (shards,)."""
        self._stored_rows = frame_tokens // context_tokens
        self._whole_frames = shard_tokens // frame_tokens
        left_tokens = shard_tokens % frame_tokens
        short_rows = -(-left_tokens // context_tokens)
        self._first_stored = _before(self._whole_frames + (left_tokens > 0))
        self._first_whole = _before(self._whole_frames)
        self._first_short_row = _before(short_rows)
        self._num_whole = int(self._whole_frames.sum())
        self._num_short_rows = int(short_rows.sum())
        self.num_frames = -(-self.num_rows // self._stored_rows)
        self.rows_per_frame = self._stored_rows
        if self.num_frames < _LARGE_FRAMES:
            self.rows_per_frame = -(-self.num_rows // self.num_frames)

    @property
    def num_rows(self) -> int:
        """Number of rows that hold tokens."""
        return self._num_whole * self._stored_rows + self._num_short_rows

    @property
    def rows_per_epoch(self) -> int:
        """Number of places of the rectangle, empty ones included."""
        return self.num_frames * self.rows_per_frame

    def locate(self, frame: Indices, row: Indices) -> tuple[Indices, Indices]:
        """Stored frame and row of each place.

        For an empty place of the rectangle, a row past the end of the last short frame.
        """
        number = frame * self.rows_per_frame + row
        whole = number // self._stored_rows
        is_whole = whole < self._num_whole
        shard = _shard_of(np.minimum(whole, self._num_whole - 1), self._first_whole)
        stored_whole = self._first_stored[shard] + whole - self._first_whole[shard]

        short_row = number - self._num_whole * self._stored_rows
        last = max(self._num_short_rows - 1, 0)
        shard = _shard_of(np.clip(short_row, 0, last), self._first_short_row)
        stored_short = self._first_stored[shard] + self._whole_frames[shard]
        row_in_short = short_row - self._first_short_row[shard]
        return (
            np.where(is_whole, stored_whole, stored_short),
            np.where(is_whole, number % self._stored_rows, row_in_short),
        )

    def place_of(self, stored_frame: Indices, stored_row: Indices) -> tuple[Indices, Indices]:
        """Frame and row in the rectangle of each stored row: the inverse of `locate`."""
        shard = _shard_of(stored_frame, self._first_stored)
        in_shard = stored_frame - self._first_stored[shard]
        row_of_whole = (self._first_whole[shard] + in_shard) * self._stored_rows
        row_of_short = self._num_whole * self._stored_rows + self._first_short_row[shard]
        is_whole = in_shard < self._whole_frames[shard]
        number = np.where(is_whole, row_of_whole, row_of_short) + stored_row
        frame = number // self.rows_per_frame
        return frame, number - frame * self.rows_per_frame


def _before(counts: Indices) -> Indices:
    """Exclusive cumulative sum: the count before each shard, shape (shards,)."""
    return np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)


def _shard_of(index: Indices, first: Indices) -> Indices:
    # `right` skips empty shards: of equal firsts, only the last shard is not empty.
    return np.searchsorted(first, index, side="right").astype(np.int64) - 1
