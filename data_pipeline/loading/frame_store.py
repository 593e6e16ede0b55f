"""Frame store: the frames of one split of a data set, with the latest ones kept decoded.

Decoded frames share one block of memory, so that the rows of a batch are copied from it in a single
call. Thread-safe. Reading and decompression release the GIL, so that frames requested ahead are
decoded while other work runs.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from threading import Condition
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError, ShardCorruptError, SourceUnreadableError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.reader import ShardReader

Ids = npt.NDArray[np.unsignedinteger[Any]]
Marks = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_LOG = logging.getLogger("megaback.data")
_OPEN_SHARDS = 256
_POLL_S = 1.0


@dataclass(frozen=True, eq=False)
class _PendingFrame:
    """A frame that is being decoded into a slot."""

    slot: int
    done: Future[None]


class FrameStore:
    """Decoded frames of a split, numbered over all of its shards."""

    def __init__(
        self, data_set: DataSet, split: str, keep_frames: int = 64, *, skip_bad_frames: bool = False
    ) -> None:
        """Opens no shard yet. Raises ConfigError when the split is empty.

        With `skip_bad_frames`, a frame that cannot be read is empty, counted and logged.
        """
        manifest = data_set.manifest
        self.data_set = data_set
        self.manifest = manifest
        self._entries = manifest.split(split)
        if not self._entries:
            raise ConfigError(
                f"the {split} set of {data_set.name} is empty; build one with more documents"
            )
        self.shard_tokens = np.array([shard.tokens for shard in self._entries], dtype=np.int64)
        frames = -(-self.shard_tokens // manifest.frame_tokens)
        self._first_frame = np.concatenate([[0], np.cumsum(frames)])
        self.num_frames = int(self._first_frame[-1])
        self._skipped: set[int] = set()
        self._skip_bad_frames = skip_bad_frames
        self._keep_frames = keep_frames
        self._changed = Condition()
        # Guarded by its lock. A slot is free, or has a frame that is pending or ready; the oldest
        # ready one is replaced first.
        self._slots = np.empty((0, manifest.frame_tokens), dtype=f"<u{manifest.id_bytes}")
        self._marks = np.empty((0, manifest.frame_tokens if self.has_examples else 0), dtype="u1")
        self._free: list[int] = []
        self._coming: dict[int, _PendingFrame] = {}
        self._ready: dict[int, int] = {}
        # Of each frame, 1 + its slot; 0 if it is not ready. Pages of zeros take no memory.
        self._slot_after = np.zeros(self.num_frames, dtype=np.int64)
        self._failed: dict[int, BaseException] = {}
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def has_examples(self) -> bool:
        """Whether the data set holds instruction examples, whose ids have marks."""
        return self.manifest.row_tokens is not None

    def rows(self, frame: Indices, row: Indices, row_tokens: int) -> tuple[Ids, Ids, Marks | None]:
        """The tokens of rows as stored, shape (rows, row_tokens), and the one after each row.

        For examples, also the marks of the tokens. Past the end of a frame are end markers without
        marks. Raises ShardCorruptError or SourceUnreadableError for a frame that cannot be read,
        unless bad frames are skipped.
        """
        tokens_NC = np.empty((len(frame), row_tokens), dtype=self._slots.dtype)
        next_N = np.empty(len(frame), dtype=self._slots.dtype)
        marks_NC = np.empty((len(frame), row_tokens), dtype="u1") if self.has_examples else None
        left = np.arange(len(frame))
        while left.size:
            # More than one round only if other threads, or these frames themselves, replace
            # frames that were just decoded.
            for number in dict.fromkeys(frame[left].tolist()):
                if number not in self._ready:
                    self._bring(number)
            left = self._copy_ready(frame, row, left, tokens_NC, next_N, marks_NC)
        return tokens_NC, next_N, marks_NC

    def spans(self, frame: Indices, start: Indices, stop: Indices) -> Ids:
        """Ids `start` to `stop` of each frame, one after the other.

        Raises the errors of `rows`.
        """
        for _ in range(2):
            # Held while ids are copied, so that no frame is replaced meanwhile.
            with self._changed:
                slot = self._slot_after[frame]
                if slot.all():  # the usual case
                    ids = bytearray().join(self._views(slot - 1, start, stop))
                    return np.frombuffer(ids, dtype=self._slots.dtype)
            for number in dict.fromkeys(frame[slot == 0].tolist()):
                self._bring(number)
        # Other threads, or these frames themselves, replace frames that were just decoded.
        left = np.arange(len(frame))
        parts = [b""] * len(frame)
        while left.size:
            for number in dict.fromkeys(frame[left].tolist()):
                self._bring(number)
            with self._changed:
                slot = self._slot_after[frame[left]] - 1
                is_there = slot >= 0
                ready = left[is_there]
                views = self._views(slot[is_there], start[ready], stop[ready])
                for number, view in zip(ready.tolist(), views, strict=True):
                    parts[number] = bytes(view)
            left = left[~is_there]
        return np.frombuffer(bytearray().join(parts), dtype=self._slots.dtype)

    def _views(self, slot: Indices, start: Indices, stop: Indices) -> Iterator[memoryview]:
        """Ids `start` to `stop` of slots."""
        before = slot * self._slots.shape[1]
        places = map(slice, (before + start).tolist(), (before + stop).tolist())
        return map(self._slots.reshape(-1).data.__getitem__, places)

    def frame(self, frame: int) -> Ids:
        """Ids of one frame. Raises ShardCorruptError or SourceUnreadableError, unless skipped."""
        number = np.array([frame])
        ids_NC, _, _ = self.rows(number, np.zeros_like(number), self.manifest.frame_tokens)
        return ids_NC[0, : 0 if frame in self._skipped else self.num_tokens(number)[0]]

    def request(self, frames: Iterable[int], executor: Executor) -> None:
        """Decode frames ahead on the executor; errors are raised when a frame is read."""
        with self._changed:
            for frame in frames:
                if frame in self._ready:
                    continue
                known = self._coming.get(frame)
                if known is not None and not known.done.cancelled():
                    continue
                slot = self._find_slot() if known is None else known.slot
                if slot is None:
                    return  # every slot is pending: this frame is decoded when it is read
                self._failed.pop(frame, None)
                self._coming[frame] = _PendingFrame(slot, executor.submit(self._fill, frame, slot))

    @property
    def skipped_frames(self) -> int:
        """Number of frames that could not be read and were skipped."""
        return len(self._skipped)

    def is_skipped(self, frame: Indices) -> npt.NDArray[np.bool_]:
        """Whether each frame could not be read and was skipped."""
        return np.isin(frame, list(self._skipped))

    def num_tokens(self, frame: Indices) -> Indices:
        """Tokens of each frame: the last one of a shard may be short."""
        shard = np.searchsorted(self._first_frame, frame, side="right") - 1
        before = (frame - self._first_frame[shard]) * self.manifest.frame_tokens
        tokens: Indices = np.minimum(self.manifest.frame_tokens, self.shard_tokens[shard] - before)
        return tokens

    def keep(self, frames: int) -> None:
        """Keep at least this many decoded frames."""
        with self._changed:
            self._keep_frames = max(self._keep_frames, frames)
            if len(self._slots):
                self._make_slots()

    def _copy_ready(
        self,
        frame: Indices,
        row: Indices,
        wanted: Indices,
        tokens_NC: Ids,
        next_N: Ids,
        marks_NC: Marks | None,
    ) -> Indices:
        """Copy the wanted rows whose frames are ready. Returns the other ones."""
        row_tokens = tokens_NC.shape[1]
        # Held while rows are copied, so that no frame is replaced meanwhile.
        with self._changed:
            slot = self._slot_after[frame[wanted]] - 1
            is_there = slot >= 0
            if not is_there.all():
                wanted, left, slot = wanted[is_there], wanted[~is_there], slot[is_there]
                if not wanted.size:
                    return left
            else:
                left = wanted[:0]
            start = slot * self._slots.shape[1] + row[wanted] * row_tokens
            place = start // row_tokens
            rows = self._slots.reshape(-1, row_tokens)
            if left.size or len(wanted) < len(tokens_NC):
                tokens_NC[wanted] = rows.take(place, axis=0, mode="clip")
            else:  # every row at once: the usual case
                np.take(rows, place, axis=0, out=tokens_NC, mode="clip")
            if marks_NC is not None:
                marks_NC[wanted] = self._marks.reshape(-1, row_tokens).take(place, 0, mode="clip")
            # After the last row of a frame there is no token; the value is meaningless.
            next_N[wanted] = self._slots.reshape(-1).take(start + row_tokens, mode="clip")
        return left

    def _bring(self, frame: int) -> None:
        """Decode a frame into a slot, or wait until another thread has."""
        with self._changed:
            if frame in self._ready:
                return
            if (error := self._failed.pop(frame, None)) is not None:
                raise error
            coming = self._coming.get(frame)
            if coming is None:
                slot = self._find_slot()
                if slot is None:  # every slot is pending; the caller tries again
                    self._changed.wait(_POLL_S)
                    return
                mine = self._coming[frame] = _PendingFrame(slot, Future())
        if coming is not None:
            self._await(frame, coming)
            return
        try:
            self._fill(frame, mine.slot)
        except BaseException as error:
            with self._changed:
                self._failed.pop(frame, None)
            mine.done.set_exception(error)
            raise
        mine.done.set_result(None)

    def _await(self, frame: int, coming: _PendingFrame) -> None:
        try:
            coming.done.result()
        except CancelledError:  # its executor was shut down before its turn
            with self._changed:
                if self._coming.get(frame) is coming:
                    self._free.append(self._coming.pop(frame).slot)
        except BaseException:
            with self._changed:
                self._failed.pop(frame, None)  # the next call reads it again
            raise

    def _fill(self, frame: int, slot: int) -> None:
        try:
            ids, marks = self._decode(frame)
        except BaseException as error:
            with self._changed:
                del self._coming[frame]
                self._free.append(slot)
                self._failed[frame] = error
                self._changed.notify_all()
            raise
        self._slots[slot, : len(ids)] = ids
        self._slots[slot, len(ids) :] = self.manifest.end_id
        if self.has_examples:
            self._marks[slot] = 0
            self._marks[slot, : len(ids)] = marks
        with self._changed:
            del self._coming[frame]
            self._ready[frame] = slot
            self._slot_after[frame] = slot + 1
            self._changed.notify_all()

    def _find_slot(self) -> int | None:
        if not len(self._slots):
            self._make_slots()
        if self._free:
            return self._free.pop()
        if not self._ready:
            cancelled = [key for key, one in self._coming.items() if one.done.cancelled()]
            return self._coming.pop(cancelled[0]).slot if cancelled else None
        # By age, not by use: rows are shuffled among frames that were read at about the same time.
        oldest = next(iter(self._ready))
        self._slot_after[oldest] = 0
        return self._ready.pop(oldest)

    def _make_slots(self) -> None:
        """Allocate slots for the frames to keep, once no frame is pending."""
        self._changed.wait_for(lambda: all(one.done.cancelled() for one in self._coming.values()))
        before = len(self._slots)
        wanted = min(self._keep_frames, self.num_frames)
        if wanted > before:
            # New slots take no memory until they are written.
            slots = np.empty((wanted, self._slots.shape[1]), dtype=self._slots.dtype)
            slots[:before] = self._slots
            self._slots = slots
            marks = np.empty((wanted, self._marks.shape[1]), dtype="u1")
            marks[:before] = self._marks
            self._marks = marks
            self._free.extend(range(wanted - 1, before - 1, -1))

    def _decode(self, frame: int) -> tuple[Ids, Marks | None]:
        shard = int(np.searchsorted(self._first_frame, frame, side="right")) - 1
        try:
            reader, number = self._reader(shard), frame - int(self._first_frame[shard])
            return reader.frame(number), reader.marks(number)
        except (ShardCorruptError, SourceUnreadableError) as error:
            if not self._skip_bad_frames:
                raise
            with self._changed:
                is_new = frame not in self._skipped
                self._skipped.add(frame)
            if is_new:
                _LOG.warning("skipped frame %d of the data set: %s", frame, error)
            return self._slots[:0, 0], self._marks[:0, 0] if self.has_examples else None

    def _reader(self, shard: int) -> ShardReader:
        with self._changed:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = self.data_set.open_shard(self._entries[shard])
        with self._changed:
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                # Not closed, as another thread may be reading; closed with its last reference.
                self._readers.popitem(last=False)
        return reader
