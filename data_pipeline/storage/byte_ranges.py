"""Any part of one file, for many threads at once: what a shard is read through.

A file on this machine or a shared file system is here; one behind a URL is in remote_ranges.py.
"""

import os
from pathlib import Path
from typing import Protocol

from data_pipeline.common.regular_files import open_file


class ByteRanges(Protocol):
    """One file. Every method but `close` may be called by several threads at once.

    Raises OSError when the file is gone, cannot be read, or was replaced since `tail` looked at it;
    over a network also SourceUnreadableError, when patience is used up.
    """

    shown: str
    """Address of the file, for messages."""

    def tail(self, num_bytes: int) -> tuple[int, bytes]:
        """The file's size, and its last `num_bytes` bytes, more of them, or all of it.

        To be called before the file is read.
        """

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        """So many bytes from `offset` on; fewer only where the file ends."""

    def close(self) -> None:
        """Give the file back; nothing may read it any more."""


class LocalRanges:
    """A file of this machine or of a shared file system.

    Dropping it closes the file: unlike `close`, that waits for whoever still reads.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.shown = str(path)
        self._descriptor: int | None = None  # what __del__ finds if opening fails
        self._descriptor = open_file(path)

    def __del__(self) -> None:
        self.close()

    def tail(self, num_bytes: int) -> tuple[int, bytes]:
        size_bytes = os.fstat(self._open_descriptor()).st_size
        offset = max(0, size_bytes - num_bytes)
        return size_bytes, self.read_at(offset, size_bytes - offset)

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        # Without a position that threads would share.
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
