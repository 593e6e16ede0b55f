"""File objects for URLs.

A file is read in blocks, each with its own retries, so that long files can be read over an
unreliable network with bounded memory.
"""

import errno
import hashlib
import io
from typing import TYPE_CHECKING

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.storage.remote_ranges import RemoteRanges
from data_pipeline.storage.stamps import STAMPED_BYTES, stamp_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 8 << 20


class RemoteFile(io.RawIOBase):
    """Seekable raw file for a URL; each read is one request per block."""

    def __init__(self, url: str) -> None:
        """Requests the size. Raises FileNotFoundError, SourceUnreadableError, BackendError."""
        self._ranges = RemoteRanges(url)
        self._position = 0
        self._facts = self._ranges.look()
        self.shown = self._ranges.shown
        self.size_bytes = self._facts.size_bytes

    def stamp(self) -> str:
        """Digest of size and version or, without a version, of size, head and tail.

        Raises SourceUnreadableError, FileNotFoundError.
        """
        size_bytes, version = self.size_bytes, self._facts.version
        if version is not None:
            return hashlib.sha256(f"{size_bytes}:{version}".encode()).hexdigest()
        head = self._read_at(0, min(STAMPED_BYTES, size_bytes))
        tail = self._read_at(max(0, size_bytes - STAMPED_BYTES), size_bytes)
        return stamp_of(size_bytes, head, tail)

    def buffered(self) -> io.BufferedReader:
        """Buffered reader in large blocks, for sequential reading."""
        return io.BufferedReader(self, BLOCK_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Reads at most one block."""
        view = memoryview(buffer).cast("B")
        part = self.read(min(len(view), BLOCK_BYTES))
        view[: len(part)] = part
        return len(part)

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads all `size` bytes, unlike most raw files: parquet's reader relies on it."""
        whole = size is None or size < 0
        stop = self.size_bytes if whole else min(self._position + (size or 0), self.size_bytes)
        part = self._read_at(self._position, stop)
        self._position += len(part)
        return part

    def _read_at(self, start: int, stop: int) -> bytes:
        try:
            parts = [
                self._ranges.read_at(begin, min(stop, begin + BLOCK_BYTES) - begin)
                for begin in range(start, stop, BLOCK_BYTES)
            ]
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            raise SourceUnreadableError(
                f"{self.shown}: changed while it was read; "
                "run the command again when the source no longer changes"
            ) from None
        return parts[0] if len(parts) == 1 else b"".join(parts)
