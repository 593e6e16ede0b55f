"""Frame cache: keeps compressed frames that were read over a network on a local disk.

The folder's size is bounded; least recently used frames are removed first. Processes may share the
folder. A cache never stops training: missing frames are fetched again, and damaged ones fail to
decode. When its disk fails it is no longer used, after one warning.

Frames are stored by origin: no data set, whatever hashes it claims, can give another one its
frames.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common.locks import locked
from data_pipeline.errors import MegabackError
from data_pipeline.shards.cache_folder import (
    LOCK_NAME,
    SIZE_NAME,
    OpenFolder,
    is_marked,
    mark,
    read_frame,
    read_small,
    remove_frames,
    require_safe,
    stored_frames,
    write_small,
    write_whole,
)

_LOG = logging.getLogger("megaback.data")
_KEPT_FRACTION = 0.9
"""Fraction of the maximum size that is kept when frames are removed, so that not every new frame
causes a scan."""
_TRIES = 2
"""Attempts to write, as another process may remove a folder whose descriptor we hold."""


@dataclass(frozen=True)
class CacheSettings:
    """Folder and size of a cache."""

    folder: Path
    max_bytes: int
    """Maximum size of all frames together."""


class FrameCache:
    """The frames of one data set. Threads may share it, and a process may fork with it."""

    def __init__(self, settings: CacheSettings, origin: str) -> None:
        """Opens nothing yet. `origin` identifies the source of the frames (origins.py)."""
        self.folder = settings.folder
        self._max_bytes = settings.max_bytes
        self._origin = origin
        self._opened: OpenFolder | None = None
        self._is_failing = False

    def of_shard(self, *identity: str | int) -> "CachedShard":
        """The frames of one shard, identified by its name, hash and size in the data set."""
        return CachedShard(self, hashlib.sha256(json.dumps([self._origin, *identity]).encode()))

    def opened(self) -> OpenFolder | None:
        """The folder for reading; None until it is marked. Raises OSError, ConfigError."""
        if self._opened is None:
            folder = OpenFolder(self.folder)
            require_safe(folder, self.folder)
            if is_marked(folder):
                self._opened = folder
        return self._opened

    def write(self, shard: "CachedShard", name: str, data: bytes) -> None:
        """Store a frame, if there is room."""
        if self._is_failing or len(data) > self._max_bytes:
            return
        try:
            for _ in range(_TRIES):
                try:
                    self._make_room(self._claim(), len(data))
                    write_whole(shard.made(), name, data)
                except FileNotFoundError:  # another process empties the folder
                    self._opened = None
                    shard.forget()
                else:
                    return
        except (OSError, MegabackError) as error:
            self._is_failing = True
            reason = error.strerror if isinstance(error, OSError) else error
            _LOG.warning(
                "the cache %s cannot be written to (%s): frames are fetched without it",
                *(self.folder, reason),
            )

    def _claim(self) -> OpenFolder:
        """The folder, created and marked if necessary. Raises OSError, ConfigError."""
        if self._opened is None:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            folder = OpenFolder(self.folder)
            require_safe(folder, self.folder)
            mark(folder)
            self._opened = folder
        return self._opened

    def _make_room(self, folder: OpenFolder, num_bytes: int) -> None:
        """Add to the size that all processes share, and remove frames if it is too large."""
        with locked(LOCK_NAME, folder=folder.number):
            try:
                counted = int(read_small(folder, SIZE_NAME) or b"") + num_bytes
            except ValueError:  # new, or damaged by a crash
                counted = self._max_bytes + 1
            if counted > self._max_bytes:
                counted = self._remove_oldest(folder, self._max_bytes - num_bytes) + num_bytes
            write_small(folder, SIZE_NAME, b"%d" % counted)

    def _remove_oldest(self, folder: OpenFolder, max_bytes: int) -> int:
        """Remove frames if they exceed a size, to well below it. Returns their total size."""
        found = stored_frames(folder)
        total = sum(frame.num_bytes for frame in found)
        if total <= max_bytes:
            return total
        removed = []
        for frame in found:
            if total <= max_bytes * _KEPT_FRACTION:
                break
            removed.append(frame)
            total -= frame.num_bytes
        remove_frames(folder, removed)
        return total


class CachedShard:
    """The cached frames of one shard: one file per frame, in one folder.

    Thread-safe; `get`, `put` and `remove` never raise.
    """

    def __init__(self, cache: FrameCache, key: "hashlib._Hash") -> None:
        self.key = key.hexdigest()
        self._cache = cache
        self._opened: OpenFolder | None = None

    def get(self, frame: int, num_bytes: int) -> bytes | None:
        """A frame as stored, perhaps damaged since; None if missing or of another size."""
        folder = self._opened or self._open()
        return None if folder is None else read_frame(folder, str(frame), num_bytes)

    def put(self, frame: int, data: bytes) -> None:
        """Store a frame, if there is room."""
        self._cache.write(self, str(frame), data)

    def remove(self, frame: int) -> None:
        """Remove a frame."""
        folder = self._opened
        if folder is not None:
            with suppress(OSError):  # else it is replaced when it is fetched again
                os.unlink(str(frame), dir_fd=folder.number)

    def made(self) -> OpenFolder:
        """The folder, created if necessary. Raises OSError, ConfigError."""
        folder = self._opened or self._open()
        if folder is None:
            cache = self._cache.opened()
            if cache is None:
                raise FileNotFoundError
            with suppress(FileExistsError):
                os.mkdir(self.key, dir_fd=cache.number)
            folder = self._opened = OpenFolder(self.key, cache)
        return folder

    def forget(self) -> None:
        """Close the folder; it is opened again when needed."""
        self._opened = None

    def _open(self) -> OpenFolder | None:
        try:
            cache = self._cache.opened()
            if cache is not None:
                self._opened = OpenFolder(self.key, cache)
        except (OSError, MegabackError):
            return None
        return self._opened
