"""Thread-safe random access to a file, used to read shards.

Local files, also on shared file systems, are read here, and URLs in remote_ranges.py.
"""

import os
from pathlib import Path
from typing import Protocol

from data_pipeline.common.regular_files import open_file


class ByteRanges(Protocol):
    """One file. All methods except `close` are thread-safe.

    They raise OSError when the file is missing, unreadable, or was replaced after `tail`; over a
    network also SourceUnreadableError, after the last retry.
    """

    shown: str
    """Address of the file, for messages."""

    def tail(self, num_bytes: int) -> tuple[int, bytes]:
        """Size of the file and at least its last `num_bytes` bytes, or all of it.

        Must be called before `read_at`.
        """

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """`num_bytes` bytes from `offset`; fewer only at the end of the file."""

    def close(self) -> None:
        """Close the file, which must not be read any more."""


class LocalRanges:
    """A local file, or one on a shared file system.

    Deleting the object closes the file, but only after the last reader has finished.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.shown = str(path)
        self._descriptor: int | None = None  # for __del__, if opening fails
        self._descriptor = open_file(path)

    def __del__(self) -> None:
        self.close()

    def tail(self, num_bytes: int) -> tuple[int, bytes]:
        size_bytes = os.fstat(self._open_descriptor()).st_size
        offset = max(0, size_bytes - num_bytes)
        return size_bytes, self.read_at(offset, size_bytes - offset)

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        # pread: no file position, which threads would share.
        data = os.pread(self._open_descriptor(), num_bytes, offset)
        while len(data) < num_bytes:
            more = os.pread(self._open_descriptor(), num_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _open_descriptor(self) -> int:
        if self._descriptor is None:
            raise ValueError(f"{self.shown} is closed")
        return self._descriptor
