"""From an order and a folder of shards to the arrays that a training step takes.

A row is `context_tokens` ids of a frame and their targets. Documents are packed one after another:
attention starts afresh at every begin marker and at every row (`cu_seqlens`), positions likewise.
A target is ignored where there is nothing to learn: past a frame's end, and from one document's
end marker to the next one's begin marker.

Direction is a way of reading: a run may read `token` shards against their stored direction. Each
row's window of `context_tokens + 1` ids is then read from its other end with begin and end markers
exchanged, so that both directions see the same windows in the same steps.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import BatchError, ConfigError, DirectionMismatchError, ShardCorruptError
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order
from data_pipeline.row_table import RowTable
from data_pipeline.shard_format import ShardReader
from data_pipeline.text import Direction, TextFormat, Unit

IGNORED_TARGET = -100

_OPEN_SHARDS = 256


@dataclass(frozen=True)
class Batch:
    """Packed rows. T is rows x context_tokens.

    ids_T, positions_T and targets_T are int64 of shape (T,); cu_seqlens is int32 of shape
    (segments + 1,), from 0 to T: where attention starts afresh.
    """

    ids_T: npt.NDArray[np.int64]
    targets_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]

    @property
    def num_targets(self) -> int:
        return int((self.targets_T != IGNORED_TARGET).sum())


class FrameStore:
    """The frames of one split of a data set, numbered through, the latest ones kept decoded."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, keep_frames: int = 64) -> None:
        """Opens no shard yet. Raises ConfigError when the split is empty."""
        self.manifest = manifest
        self._folder = folder
        self._entries = manifest.split(split)
        if not self._entries:
            raise ConfigError(
                f"the {split} set of {folder} is empty; build one with more documents"
            )
        frame_tokens = manifest.frame_tokens
        frames = [-(-shard.tokens // frame_tokens) for shard in self._entries]
        self._first_frame = np.concatenate([[0], np.cumsum(frames, dtype=np.int64)])
        self.num_frames = int(self._first_frame[-1])
        self.shard_tokens = np.array([shard.tokens for shard in self._entries], dtype=np.int64)
        self._keep_frames = keep_frames
        self._decoded: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def frame(self, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids of one frame. Raises ShardCorruptError naming file, frame and byte offset."""
        if frame in self._decoded:
            self._decoded.move_to_end(frame)
            return self._decoded[frame]
        shard = int(np.searchsorted(self._first_frame, frame, side="right")) - 1
        ids = self._reader(shard).frame(frame - int(self._first_frame[shard]))
        self._decoded[frame] = ids
        if len(self._decoded) > self._keep_frames:
            self._decoded.popitem(last=False)
        return ids

    def num_tokens(self, frame: int) -> int:
        """Tokens of a frame: the last one of a shard may be short."""
        shard = int(np.searchsorted(self._first_frame, frame, side="right")) - 1
        frame_tokens = self.manifest.frame_tokens
        before = (frame - int(self._first_frame[shard])) * frame_tokens
        return min(frame_tokens, self._entries[shard].tokens - before)

    def keep(self, frames: int) -> None:
        """Keep at least this many decoded frames."""
        self._keep_frames = max(self._keep_frames, frames)

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            entry = self._entries[shard]
            reader = self.manifest.open_shard(self._folder, entry)
            if (reader.file_bytes, reader.header.tokens) != (entry.file_bytes, entry.tokens):
                raise ShardCorruptError(
                    f"the shard {reader.path} is not the one in the manifest: it has "
                    f"{reader.file_bytes} bytes instead of {entry.file_bytes}; "
                    "restore it or build the shards again"
                )
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)[1].close()
        return self._readers[shard]


class RowReader:
    """Turns places of rows into batches, in the direction in which the run reads."""

    def __init__(self, frames: FrameStore, context_tokens: int, direction: Direction) -> None:
        """Raises ConfigError or DirectionMismatchError when these shards cannot be read so."""
        manifest = frames.manifest
        check_context(context_tokens, manifest.frame_tokens)
        self.text_format = format_read_as(manifest.text_format, direction)
        self._flipped = direction is not manifest.text_format.direction
        self._frames = frames
        self.context_tokens = context_tokens
        self._begin_id = manifest.begin_id
        self._end_id = manifest.end_id

    def window(self, frame: int, row: int) -> npt.NDArray[np.int64]:
        """The ids of a row and the one after it, in reading order: at most context_tokens + 1."""
        start = row * self.context_tokens
        window = self._frames.frame(frame)[start : start + self.context_tokens + 1]
        ids: npt.NDArray[np.int64] = window.astype(np.int64)
        if self._flipped:
            ids = ids[::-1].copy()
            begins, ends = ids == self._begin_id, ids == self._end_id
            ids[begins], ids[ends] = self._end_id, self._begin_id
        return ids

    def batch(self, frame: npt.NDArray[np.int64], row: npt.NDArray[np.int64]) -> Batch:
        """Pack the rows at these places. A row past the end of a short frame has no targets."""
        num_rows, context_tokens = len(frame), self.context_tokens
        # The padding of short rows is end markers that attend to the row before them and that
        # nothing attends to; their targets are ignored.
        ids_NC = np.full((num_rows, context_tokens), self._end_id, dtype=np.int64)
        targets_NC = np.full((num_rows, context_tokens), IGNORED_TARGET, dtype=np.int64)
        for index in range(num_rows):
            window = self.window(int(frame[index]), int(row[index]))
            ids_NC[index, : len(window)] = window[:context_tokens]
            targets_NC[index, : max(len(window) - 1, 0)] = window[1:]
        between_documents = (ids_NC == self._end_id) & (targets_NC == self._begin_id)
        targets_NC[between_documents] = IGNORED_TARGET

        starts_NC = ids_NC == self._begin_id
        starts_NC[:, 0] = True
        starts = np.flatnonzero(starts_NC)
        total = num_rows * context_tokens
        cu_seqlens = np.append(starts, total).astype(np.int32)
        positions_T = np.arange(total) - np.repeat(starts, np.diff(cu_seqlens))
        return Batch(ids_NC.reshape(-1), targets_NC.reshape(-1), positions_T, cu_seqlens)


class TrainingBatches:
    """The training rows of one rank, step by step: stateless, so any step can be asked for."""

    def __init__(
        self,
        frames: FrameStore,
        rows: RowReader,
        table: RowTable,
        order: Order,
        rank: int,
        world_size: int,
        micro_batch_rows: int,
    ) -> None:
        """Raises BatchError unless ranks and micro-batches divide the batch evenly."""
        if order.global_batch_rows % (world_size * micro_batch_rows):
            raise BatchError(
                f"{world_size} ranks x {micro_batch_rows} rows a micro-batch do not divide "
                f"batch.global_batch_rows {order.global_batch_rows}"
            )
        self._rows = rows
        self._table = table
        self._order = order
        self._rank_rows = order.global_batch_rows // world_size
        self._first_row = rank * self._rank_rows
        self._micro_batch_rows = micro_batch_rows
        # A lane moves from one window of frames to the next, so it may need both at a time.
        rank_lanes = -(-self._rank_rows * order.lanes // order.global_batch_rows) + 1
        frames.keep(2 * rank_lanes * order.window_frames)

    def at(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step: its contiguous slice of the global batch."""
        places = self._order.places(step, self._first_row, self._first_row + self._rank_rows)
        frame, row = self._table.locate(places.frame, places.row)
        return [
            self._rows.batch(
                frame[start : start + self._micro_batch_rows],
                row[start : start + self._micro_batch_rows],
            )
            for start in range(0, self._rank_rows, self._micro_batch_rows)
        ]


def sequential_batches(
    frames: FrameStore, rows: RowReader, rank: int, world_size: int, micro_batch_rows: int
) -> Iterator[Batch]:
    """Every row of a split once, in stored order, dealt to the ranks: the val set.

    Every rank gets the same number of batches of the same shape, filled up with rows that have no
    targets, because sharded ranks must take every forward pass together.
    """
    place = [
        (frame, row)
        for frame in range(frames.num_frames)
        for row in range(-(-frames.num_tokens(frame) // rows.context_tokens))
    ]
    frame_of_nothing, row_of_nothing = place[-1][0], place[-1][1] + 1
    group_rows = world_size * micro_batch_rows
    place += [(frame_of_nothing, row_of_nothing)] * (-len(place) % group_rows)
    table = np.array(place, dtype=np.int64)
    for start in range(rank * micro_batch_rows, len(table), group_rows):
        chosen = table[start : start + micro_batch_rows]
        yield rows.batch(chosen[:, 0], chosen[:, 1])


def check_context(context_tokens: int, frame_tokens: int) -> None:
    """Raises ConfigError unless a frame holds a whole number of rows."""
    if context_tokens > frame_tokens or frame_tokens % context_tokens:
        raise ConfigError(
            f"batch.context_tokens is {context_tokens}, which does not divide the shards' frames "
            f"of {frame_tokens} tokens; choose a power of two up to {frame_tokens}"
        )


def format_read_as(stored: TextFormat, direction: Direction) -> TextFormat:
    """The format of what a run reads: the stored one, or its mirror image.

    Raises DirectionMismatchError for `word` shards read against their direction.
    """
    if direction is not stored.direction and stored.unit is Unit.WORD:
        raise DirectionMismatchError(
            f"the run reads {direction.value!r}, but the shards hold direction "
            f"{stored.direction.value!r} in unit 'word', which cannot be flipped; "
            f"build shards with --direction {direction.value}"
        )
    return TextFormat(direction, stored.unit, stored.tokenizer_sha256)
