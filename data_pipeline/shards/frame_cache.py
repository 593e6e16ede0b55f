"""Compressed frames that came over a network, kept on a disk of this machine.

The folder's size is bounded, and the frames that were not used for longest go first. Processes may
share the folder. A cache never stops training: what it does not have is fetched again, and what is
damaged shows when it is decoded. When its disk fails it is left alone, after one warning.

Frames are kept by where they came from: no data set, whatever hashes it claims, can give another
one its frames.
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
"""Fraction of the maximum size that is kept when frames are removed, as not every frame is worth a
look at all."""
_TRIES = 2
"""Whoever removes a folder meanwhile leaves us with descriptors of what is gone."""


@dataclass(frozen=True)
class CacheSettings:
    """Where frames are kept."""

    folder: Path
    max_bytes: int
    """Maximum size of all frames together."""


class FrameCache:
    """The frames of one data set. Threads may share it, and a process may fork with it."""

    def __init__(self, settings: CacheSettings, origin: str) -> None:
        """Touches nothing yet. `origin` says who decides what the frames are (origins.py)."""
        self.folder = settings.folder
        self._max_bytes = settings.max_bytes
        self._origin = origin
        self._opened: OpenFolder | None = None
        self._is_failing = False

    def of_shard(self, *identity: str | int) -> "CachedShard":
        """The frames of one shard, by what the data set says of it: its name, hash and size."""
        return CachedShard(self, hashlib.sha256(json.dumps([self._origin, *identity]).encode()))

    def opened(self) -> OpenFolder | None:
        """The folder for reading; None while there is none of ours. Raises OSError, ConfigError."""
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
                except FileNotFoundError:  # somebody empties the folder at this moment
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
        """The folder, made and marked if it was not. Raises OSError, ConfigError."""
        if self._opened is None:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            folder = OpenFolder(self.folder)
            require_safe(folder, self.folder)
            mark(folder)
            self._opened = folder
        return self._opened

    def _make_room(self, folder: OpenFolder, num_bytes: int) -> None:
        """Add to the size that all processes count together, and remove frames if it is due."""
        with locked(LOCK_NAME, folder=folder.number):
            try:
                counted = int(read_small(folder, SIZE_NAME) or b"") + num_bytes
            except ValueError:  # new, or a crash came between
                counted = self._max_bytes + 1
            if counted > self._max_bytes:
                counted = self._remove_oldest(folder, self._max_bytes - num_bytes) + num_bytes
            write_small(folder, SIZE_NAME, b"%d" % counted)

    def _remove_oldest(self, folder: OpenFolder, max_bytes: int) -> int:
        """Bring all frames below a size, with room to spare; their size afterwards."""
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
    """The frames of one shard: a file each, in a folder of their own.

    May be called by several threads at once; never raises.
    """

    def __init__(self, cache: FrameCache, key: "hashlib._Hash") -> None:
        self.key = key.hexdigest()
        self._cache = cache
        self._opened: OpenFolder | None = None

    def get(self, frame: int, num_bytes: int) -> bytes | None:
        """A frame as it was stored, perhaps damaged since; None if it is not there any more.

        Nor is it one if it has another size than it must have.
        """
        folder = self._opened or self._open()
        return None if folder is None else read_frame(folder, str(frame), num_bytes)

    def put(self, frame: int, data: bytes) -> None:
        """Store a frame, if there is room."""
        self._cache.write(self, str(frame), data)

    def remove(self, frame: int) -> None:
        """Forget a frame."""
        folder = self._opened
        if folder is not None:
            with suppress(OSError):  # if it stays, it is replaced when it is fetched again
                os.unlink(str(frame), dir_fd=folder.number)

    def made(self) -> OpenFolder:
        """The folder, which is made if there is none. Raises OSError, ConfigError."""
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
        """Look for the folder again when it is needed."""
        self._opened = None

    def _open(self) -> OpenFolder | None:
        try:
            cache = self._cache.opened()
            if cache is not None:
                self._opened = OpenFolder(self.key, cache)
        except (OSError, MegabackError):
            return None
        return self._opened
