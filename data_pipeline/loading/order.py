"""Training order: the rows of each step, by index arithmetic alone.

The rows of step s are a pure function of (seed, shape of the data, global_batch_rows, s). Frames
are permuted in every epoch and dealt in turn to `lanes` parallel streams; each step takes
`global_batch_rows / lanes` rows of every lane; within a lane, rows are permuted among
`window_frames` consecutive frames. Every row of every frame occurs exactly once per epoch. Ranks
take contiguous slices of a step's rows, so neither their number nor restarts change the order. No
permutation is stored: memory does not grow with the corpus.

The permutations are Feistel networks with cycle walking (Black & Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002) over the mixing function of SplitMix64 (Steele, Lea & Flood, 2014).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import BatchError, ConfigError, RunMismatchError

ORDER_VERSION = 1
"""Version of the order: of this module, `mixture`, `row_grid` and `directions`. A change that gives
any existing run other rows needs the next number."""

_FEISTEL_ROUNDS = 6
MAX_AUTOMATIC_LANES = 1024

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUND_NUMBERS = np.arange(_FEISTEL_ROUNDS, dtype=np.uint64).reshape(-1, 1)
_POWERS_OF_FOUR = 4 ** np.arange(1, 32)
# Zero-dimensional arrays, which numpy combines with small arrays twice as fast as scalars.
_ONE, _INCREMENT, _FIRST_FACTOR, _SECOND_FACTOR, _FIRST_SHIFT, _SECOND_SHIFT, _THIRD_SHIFT = (
    np.array(word, dtype=np.uint64)
    for word in (1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 30, 27, 31)
)


@dataclass(frozen=True)
class RowPlace:
    """Places of rows: arrays of one shape, with an entry per row."""

    epoch: Indices
    frame: Indices
    row: Indices


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the rows of `num_frames` frames of `rows_per_frame` rows."""

    num_frames: int
    rows_per_frame: int
    global_batch_rows: int
    lanes: int
    seed: int
    window_frames: int = 8
    missing_rows: int = 0
    """Rows that every lane lacks at the beginning of step 0, fewer than a step takes of it: after a
    change of the batch, the rows before are not a whole number of steps."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a number below 1, BatchError unless lanes divide the batch."""
        for name in ("num_frames", "rows_per_frame", "global_batch_rows", "lanes", "window_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.global_batch_rows % self.lanes:
            raise BatchError(
                f"lanes {self.lanes} does not divide global_batch_rows "
                f"{self.global_batch_rows}; choose a divisor, or omit lanes"
            )

    @property
    def rows_per_epoch(self) -> int:
        return self.num_frames * self.rows_per_frame

    def places(self, step: int, start: int = 0, stop: int | None = None) -> RowPlace:
        """Places of rows `start` to `stop` (default: all) of the batch at `step`."""
        stop = self.global_batch_rows if stop is None else stop
        position = np.arange(start, stop, dtype=np.int64)
        return self.places_of(np.full_like(position, step), position)

    def places_of(self, step: Indices, position: Indices) -> RowPlace:
        """The place of the row at each position of the global batch of each step.

        Arguments and results have one shape. The cost per row is lowest for a few thousand rows.
        """
        rows_per_lane = self.global_batch_rows // self.lanes
        lane = position // rows_per_lane
        lane_row = (step - lane) * rows_per_lane + position - self.missing_rows

        # A lane's frames are the positions lane, lane + L, lane + 2L, ... of the infinite deal.
        slot = lane_row // self.rows_per_frame
        epoch = (slot * self.lanes + lane) // self.num_frames
        window, window_slot, window_rows = self._window_of(epoch, lane, slot)
        row_in_window = lane_row - window_slot * self.rows_per_frame
        shuffled = permute(row_in_window, window_rows, self._row_key(epoch, lane, window))
        frame_in_window = shuffled // self.rows_per_frame
        dealt = (window_slot + frame_in_window) * self.lanes + lane - epoch * self.num_frames
        frame = permute(dealt, np.array([self.num_frames]), self._frame_key(epoch))
        return RowPlace(epoch, frame, shuffled - frame_in_window * self.rows_per_frame)

    def find(self, epoch: Indices, frame: Indices, row: Indices) -> tuple[Indices, Indices]:
        """The step that reads each row in an epoch, and the row's position in the global batch.

        The inverse of `places_of`; all arrays have one shape.
        """
        dealt = unpermute(frame, np.array([self.num_frames]), self._frame_key(epoch))
        dealt += epoch * self.num_frames
        slot = dealt // self.lanes
        lane = dealt - slot * self.lanes
        window, window_slot, window_rows = self._window_of(epoch, lane, slot)
        shuffled = (slot - window_slot) * self.rows_per_frame + row
        row_in_window = unpermute(shuffled, window_rows, self._row_key(epoch, lane, window))
        lane_row = window_slot * self.rows_per_frame + row_in_window + self.missing_rows
        rows_per_lane = self.global_batch_rows // self.lanes
        step = lane_row // rows_per_lane
        return step, (lane - step) * rows_per_lane + lane_row

    def _window_of(
        self, epoch: Indices, lane: Indices, slot: Indices
    ) -> tuple[Indices, Indices, Indices]:
        """Number, first slot and number of rows of the window that holds a slot of a lane.

        Lanes begin new windows at different times, so that the frames of all lanes are not needed
        at once.
        """
        first_slot = self._first_slot(epoch, lane)
        ahead = lane * self.window_frames // self.lanes
        window = (slot - first_slot + ahead) // self.window_frames
        begin = first_slot + window * self.window_frames - ahead
        window_slot = np.maximum(begin, first_slot)
        stop = np.minimum(begin + self.window_frames, self._first_slot(epoch + 1, lane))
        return window, window_slot, (stop - window_slot) * self.rows_per_frame

    def _first_slot(self, epoch: Indices, lane: Indices) -> Indices:
        """The first of a lane's frames that belongs to an epoch."""
        return (epoch * self.num_frames - lane + self.lanes - 1) // self.lanes

    def _row_key(self, epoch: Indices, lane: Indices, window: Indices) -> _Words:
        return _key(self.seed, 1, _once_if_equal(epoch), lane, window)

    def _frame_key(self, epoch: Indices) -> _Words:
        return _key(self.seed, 0, _once_if_equal(epoch))


def require_order_version(version: object, origin: str) -> None:
    """Require that `origin` was ordered by this version. Raises RunMismatchError."""
    if version != ORDER_VERSION:
        raise RunMismatchError(
            f"{origin} has version {version} of the order of rows, and this megaback has version "
            f"{ORDER_VERSION}, which would give it other rows; use the megaback that began it, or "
            "begin again (a run from its weights: init_from)"
        )


def choose_lanes(num_frames: int, global_batch_rows: int) -> int:
    """The largest divisor of the batch with at least one frame per lane."""
    maximum = min(num_frames, global_batch_rows, MAX_AUTOMATIC_LANES)
    return next(lanes for lanes in range(maximum, 0, -1) if global_batch_rows % lanes == 0)


def permute(index: Indices, size: Indices, key: _Words) -> Indices:
    """The image of each index under a pseudo-random permutation of 0 .. size-1, chosen by key.

    `size` and `key` have an entry per index, or one for all. A bijection for every key: a balanced
    Feistel network over the next power of four, iterated until back in range.
    """
    return _walk(index, size, key, _encipher)


def unpermute(image: Indices, size: Indices, key: _Words) -> Indices:
    """The index that `permute` maps to each image: the same walk backwards."""
    return _walk(image, size, key, _decipher)


@dataclass(frozen=True)
class _Network:
    """A Feistel network per entry, along the last axis; or one for all, without that axis."""

    limit: _Words
    half_bits: _Words
    round_keys: _Words

    @classmethod
    def of(cls, size: Indices, key: _Words) -> "_Network":
        sizes, keys = np.broadcast_arrays(size.reshape(-1), key.reshape(-1))
        # Half the bits of the smallest power of four that is not below size, at least 1.
        half_bits = (1 + np.searchsorted(_POWERS_OF_FOUR, sizes)).astype(np.uint64)
        round_keys = _mix(keys + _ROUND_NUMBERS)
        limit = sizes.astype(np.uint64)
        if len(sizes) == 1:
            return cls(limit[0, ...], half_bits[0, ...], round_keys[:, 0])
        return cls(limit, half_bits, round_keys)

    def at(self, entries: Indices) -> "_Network":
        if self.limit.ndim == 0:
            return self
        return _Network(
            self.limit[entries], self.half_bits[entries], self.round_keys.take(entries, axis=1)
        )

    def run(self, left: _Words, right: _Words, rounds: Iterable[int]) -> tuple[_Words, _Words]:
        half_mask = (_ONE << self.half_bits) - _ONE
        for number in rounds:
            mixed = _mix(right ^ self.round_keys[number, ...])
            mixed &= half_mask
            mixed ^= left
            left, right = right, mixed
        return left, right


def _walk(
    start: Indices,
    size: Indices,
    key: _Words,
    encipher: Callable[[_Words, _Network], _Words],
) -> Indices:
    """Encipher every value until it is below its size, at least once."""
    network = _Network.of(size, key)
    value = encipher(start.reshape(-1).astype(np.uint64), network)
    outside = np.flatnonzero(value >= network.limit)
    while outside.size:
        of_outside = network.at(outside)
        walked = encipher(value[outside], of_outside)
        value[outside] = walked
        outside = outside[walked >= of_outside.limit]
    return value.astype(np.int64).reshape(start.shape)


def _encipher(value: _Words, network: _Network) -> _Words:
    left = value >> network.half_bits
    right = value ^ (left << network.half_bits)
    left, right = network.run(left, right, range(_FEISTEL_ROUNDS))
    return (left << network.half_bits) | right


def _decipher(value: _Words, network: _Network) -> _Words:
    left = value >> network.half_bits
    right = value ^ (left << network.half_bits)
    # The inverse of a Feistel network: halves exchanged, rounds in reverse.
    right, left = network.run(right, left, reversed(range(_FEISTEL_ROUNDS)))
    return (left << network.half_bits) | right


def _once_if_equal(epoch: Indices) -> Indices:
    """A single epoch if all are equal, so that keys are computed once."""
    first = epoch.reshape(-1)[:1]
    return first if (epoch == first).all() else epoch


def _key(seed: int, purpose: int, *parts: Indices) -> _Words:
    key = _mix(np.array([(seed * 2 + purpose) % (1 << 64)], dtype=np.uint64))
    for part in parts:
        key = _mix(key ^ part.astype(np.uint64))
    return key


def _mix(words: _Words) -> _Words:
    """The output function of SplitMix64; arithmetic modulo 2**64."""
    words = words + _INCREMENT
    words ^= words >> _FIRST_SHIFT
    words *= _FIRST_FACTOR
    words ^= words >> _SECOND_SHIFT
    words *= _SECOND_FACTOR
    words ^= words >> _THIRD_SHIFT
    return words
