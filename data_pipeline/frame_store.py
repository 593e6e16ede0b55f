"""The frames of one split of a data set, numbered through, the latest ones kept decoded.

Any thread may ask for a frame. Reading and decompressing release Python's lock, so that frames
which are requested early are decoded beside whatever else runs.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Executor, Future
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.data_set import DataSet
from data_pipeline.errors import ConfigError, ShardCorruptError, SourceUnreadableError
from data_pipeline.shard_format import ShardReader

Ids = npt.NDArray[np.unsignedinteger[Any]]

_LOG = logging.getLogger("megaback.data")
_OPEN_SHARDS = 256


class FrameStore:
    """Decoded frames by number."""

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
        self._nothing = np.empty(0, dtype=f"<u{manifest.id_bytes}")
        self._lock = Lock()
        self._frames: dict[int, Ids | Future[Ids]] = {}
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def frame(self, frame: int) -> Ids:
        """Ids of one frame. Raises ShardCorruptError or SourceUnreadableError, unless skipped."""
        found = self._frames.get(frame)
        if isinstance(found, Future):
            found = self._requested(frame, found)
        if found is None:
            found = self._decode(frame)
            self._keep(frame, found)
        return found

    def request(self, frames: Iterable[int], executor: Executor) -> None:
        """Have frames decoded that will be asked for; errors come when they are."""
        for frame in frames:
            with self._lock:
                known = self._frames.get(frame)
                if known is not None and not _has_failed(known):
                    continue
                self._frames[frame] = executor.submit(self._decode, frame)
                self._drop_oldest()

    @property
    def skipped_frames(self) -> int:
        """How many frames could not be read and were left out."""
        return len(self._skipped)

    def num_tokens(self, frame: int) -> int:
        """Tokens of a frame: the last one of a shard may be short."""
        shard, in_shard = self._place(frame)
        before = in_shard * self.manifest.frame_tokens
        return min(self.manifest.frame_tokens, self._entries[shard].tokens - before)

    def keep(self, frames: int) -> None:
        """Keep at least this many decoded frames."""
        self._keep_frames = max(self._keep_frames, frames)

    def _place(self, frame: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first_frame, frame, side="right")) - 1
        return shard, frame - int(self._first_frame[shard])

    def _requested(self, frame: int, future: Future[Ids]) -> Ids | None:
        """A frame that was requested; None if its executor was shut down before its turn."""
        try:
            ids = future.result()
        except CancelledError:
            return None
        except BaseException:
            # Read again when it is asked for again, as without a request.
            with self._lock:
                if self._frames.get(frame) is future:
                    del self._frames[frame]
            raise
        self._keep(frame, ids)
        return ids

    def _keep(self, frame: int, ids: Ids) -> None:
        with self._lock:
            self._frames[frame] = ids
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        # By age, not by use: rows are shuffled among frames that came at about the same time.
        while len(self._frames) > self._keep_frames:
            del self._frames[next(iter(self._frames))]

    def _decode(self, frame: int) -> Ids:
        shard, in_shard = self._place(frame)
        try:
            return self._reader(shard).frame(in_shard)
        except (ShardCorruptError, SourceUnreadableError) as error:
            if not self._skip_bad_frames:
                raise
            with self._lock:
                is_new = frame not in self._skipped
                self._skipped.add(frame)
            if is_new:
                _LOG.warning("left out frame %d of the data set: %s", frame, error)
            return self._nothing

    def _reader(self, shard: int) -> ShardReader:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = self.data_set.open_shard(self._entries[shard])
        with self._lock:
            self._readers[shard] = reader
            if len(self._readers) > _OPEN_SHARDS:
                # Not closed: another thread may be reading. It closes with its last reference.
                self._readers.popitem(last=False)
        return reader


def _has_failed(known: Ids | Future[Ids]) -> bool:
    if not isinstance(known, Future) or not known.done():
        return False
    return known.cancelled() or known.exception() is not None
