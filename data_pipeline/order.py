"""Which rows the training sees at which step: index arithmetic, and nothing else.

The rows of step s are a pure function of (seed, shape of the data, global_batch_rows, s). Frames
are permuted anew in every epoch and dealt like cards to `lanes` parallel streams; each step takes
`global_batch_rows / lanes` rows of every lane; within a lane, rows are permuted among
`window_frames` neighbouring frames. Every row of every frame comes exactly once an epoch. Ranks
take contiguous slices of a step's rows, so that they, and restarts, change nothing. No permutation
is stored: memory does not grow with the corpus.

The permutations are Feistel networks with cycle walking (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002) over the mixing function of SplitMix64 (Steele, Lea & Flood, 2014).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import BatchError, ConfigError

_FEISTEL_ROUNDS = 6
_MAX_AUTOMATIC_LANES = 1024

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class RowPlace:
    """Where the rows of a step lie, one entry a row: each array has shape (rows,)."""

    epoch: Indices
    frame: Indices
    row: Indices


@dataclass(frozen=True)
class Order:
    """The order of the rows of `num_frames` frames of `rows_per_frame` rows."""

    num_frames: int
    rows_per_frame: int
    global_batch_rows: int
    lanes: int
    seed: int
    window_frames: int = 8

    def __post_init__(self) -> None:
        """Raises BatchError or ConfigError when the numbers do not fit each other."""
        counts = (self.num_frames, self.rows_per_frame, self.global_batch_rows, self.lanes)
        if min(*counts, self.window_frames) < 1:
            raise ConfigError(f"an order needs at least one of everything: {self}")
        if self.global_batch_rows % self.lanes:
            raise BatchError(
                f"data.lanes {self.lanes} does not divide batch.global_batch_rows "
                f"{self.global_batch_rows}; choose a divisor, or leave data.lanes out"
            )

    @property
    def rows_per_epoch(self) -> int:
        return self.num_frames * self.rows_per_frame

    def places(self, step: int, start: int = 0, stop: int | None = None) -> RowPlace:
        """Places of rows `start` to `stop` (default: all) of the batch at `step`."""
        stop = self.global_batch_rows if stop is None else stop
        position = np.arange(start, stop, dtype=np.int64)
        rows_per_lane = self.global_batch_rows // self.lanes
        lane = position // rows_per_lane
        lane_row = step * rows_per_lane + position % rows_per_lane

        # A lane's frames are the positions lane, lane + L, lane + 2L, ... of the endless deal.
        slot = lane_row // self.rows_per_frame
        epoch = (slot * self.lanes + lane) // self.num_frames
        first_slot = _ceil_div(epoch * self.num_frames - lane, self.lanes)
        num_slots = _ceil_div((epoch + 1) * self.num_frames - lane, self.lanes) - first_slot
        window = (slot - first_slot) // self.window_frames
        window_slot = window * self.window_frames
        window_rows = np.minimum(self.window_frames, num_slots - window_slot) * self.rows_per_frame
        row_in_window = (
            slot - first_slot - window_slot
        ) * self.rows_per_frame + lane_row % self.rows_per_frame

        shuffled = permute(row_in_window, window_rows, _key(self.seed, 1, epoch, lane, window))
        dealt = (first_slot + window_slot + shuffled // self.rows_per_frame) * self.lanes + lane
        frame = permute(
            dealt - epoch * self.num_frames,
            np.full_like(dealt, self.num_frames),
            _key(self.seed, 0, epoch),
        )
        return RowPlace(epoch, frame, shuffled % self.rows_per_frame)


def choose_lanes(num_frames: int, global_batch_rows: int) -> int:
    """The largest divisor of the batch that the data can feed: at most one lane a frame."""
    most = min(num_frames, global_batch_rows, _MAX_AUTOMATIC_LANES)
    return next(lanes for lanes in range(most, 0, -1) if global_batch_rows % lanes == 0)


def permute(index: Indices, size: Indices, key: _Words) -> Indices:
    """Where a pseudo-random permutation of 0 .. size-1, chosen by key, sends each index.

    All arrays have one shape; `size` and `key` may differ from entry to entry. A bijection for
    every key: a balanced Feistel network over the next power of four, walked until back in range.
    """
    size_words = size.astype(np.uint64)
    half_bits = _half_bits(size)
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            mixed = _mix(right ^ _mix(key + np.uint64(round_number)))
            left, right = right, left ^ (mixed & half_mask)
        value = np.where(outside, (left << half_bits) | right, value)
        outside = value >= size_words
    return value.astype(np.int64)


def _half_bits(size: Indices) -> _Words:
    bits = np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))).astype(np.int64)
    bits += (np.int64(1) << bits) < size  # in case the logarithm was rounded down
    return ((bits + 1) // 2).astype(np.uint64)


def _key(seed: int, purpose: int, *parts: Indices) -> _Words:
    start = np.full(parts[0].shape, (seed * 2 + purpose) % (1 << 64), dtype=np.uint64)
    key = _mix(start)
    for part in parts:
        key = _mix(key ^ part.astype(np.uint64))
    return key


def _mix(words: _Words) -> _Words:
    """The output function of SplitMix64; arithmetic modulo 2**64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _ceil_div(numerator: Indices, denominator: int) -> Indices:
    return -(-numerator // denominator)
