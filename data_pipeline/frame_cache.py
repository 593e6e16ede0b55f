"""Compressed frames that came over a network, kept on a disk of this machine.

The folder's size is bounded, and the frames that were not used for longest go first. Processes may
share the folder. A cache never stops anybody: what it does not have is fetched again, and what is
damaged shows when it is decoded. When its disk fails it is left alone, after one warning.
"""

import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.locks import locked

_LOG = logging.getLogger("megaback.data")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOCK_NAME = ".lock"
_SIZE_NAME = ".bytes"
_KEPT_FRACTION = 0.9
"""Of the largest size, when frames are removed: looking at all of them is not for every frame."""


@dataclass(frozen=True)
class CacheSettings:
    """Where frames are kept."""

    folder: Path
    max_bytes: int
    """Of all frames together."""


class FrameCache:
    """The frames of any shards. Threads may share it."""

    def __init__(self, settings: CacheSettings) -> None:
        """Touches nothing yet."""
        self.folder = settings.folder
        self._max_bytes = settings.max_bytes
        self._is_failing = False

    def of_shard(self, file_sha256: str) -> "CachedShard | None":
        """The frames of one shard; None for what is no hash, of which no folder is made."""
        return CachedShard(self, file_sha256) if _SHA256.fullmatch(file_sha256) else None

    def write(self, path: Path, data: bytes) -> None:
        """Store a frame, if there is room."""
        if self._is_failing or len(data) > self._max_bytes:
            return
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            try:
                # Not flushed: a frame that a crash damages is fetched again.
                partial.write_bytes(data)
                os.replace(partial, path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        except FileNotFoundError:
            return  # somebody empties the folder at this moment
        except OSError as error:
            self._is_failing = True
            _LOG.warning(
                "the cache %s cannot be written to (%s): frames are fetched without it",
                *(self.folder, error.strerror),
            )

    def _make_room(self, num_bytes: int) -> None:
        """Add to the size that all processes count together, and remove frames if it is due."""
        with locked(self.folder / _LOCK_NAME):
            counter = self.folder / _SIZE_NAME
            try:
                counted = int(counter.read_bytes()) + num_bytes
            except (FileNotFoundError, ValueError):  # new, or a crash came between
                counted = self._max_bytes + 1
            if counted > self._max_bytes:
                counted = self._remove_oldest(self._max_bytes - num_bytes) + num_bytes
            counter.write_bytes(b"%d" % counted)

    def _remove_oldest(self, most_bytes: int) -> int:
        """Bring all frames below a size, with room to spare; their size afterwards."""
        found = sorted(self._frames())
        total = sum(size for _, size, _ in found)
        if total <= most_bytes:
            return total
        for _, size, path in found:
            if total <= most_bytes * _KEPT_FRACTION:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total

    def _frames(self) -> Iterator[tuple[int, int, str]]:
        """Time of last use, size and path of every frame, whole or in the making."""
        with os.scandir(self.folder) as shards:
            folders = [shard.path for shard in shards if shard.is_dir()]
        for folder in folders:
            with os.scandir(folder) as files:
                for file in files:
                    try:
                        facts = file.stat()
                    except FileNotFoundError:  # renamed just now, or removed
                        continue
                    yield facts.st_mtime_ns, facts.st_size, file.path


class CachedShard:
    """The frames of one shard: a file each, in a folder that is named after its SHA-256."""

    def __init__(self, cache: FrameCache, file_sha256: str) -> None:
        self._cache = cache
        self._folder = cache.folder / file_sha256[:16]

    def get(self, frame: int) -> bytes | None:
        """A frame as it was stored, perhaps damaged since; None if it is not there any more."""
        try:
            # Not by pathlib, which would take longer than the disk.
            file = os.open(f"{self._folder}/{frame}", os.O_RDONLY)
        except OSError:
            return None
        try:
            data = os.pread(file, os.fstat(file).st_size, 0)
            # The latest use, whatever the disk notes of reads; it may be one that is read only.
            with suppress(OSError):
                os.utime(file)
        except OSError:
            return None
        finally:
            os.close(file)
        return data

    def put(self, frame: int, data: bytes) -> None:
        """Store a frame, if there is room."""
        self._cache.write(self._folder / str(frame), data)

    def remove(self, frame: int) -> None:
        """Forget a frame."""
        with suppress(OSError):  # if it stays, it is replaced when it is fetched again
            (self._folder / str(frame)).unlink()
