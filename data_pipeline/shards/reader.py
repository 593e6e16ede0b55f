"""Shard reader: reads the index of a file on opening, and its frames on request.

writer.py describes the format.
"""

import struct
import threading
from collections.abc import Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from data_pipeline.errors import ShardCorruptError
from data_pipeline.shards.compression import Compression, read_dictionary
from data_pipeline.shards.examples import NUM_COUNTS, ExampleMarks, require_rows
from data_pipeline.shards.frame_cache import CachedShard
from data_pipeline.shards.index import COUNT_BYTES, read_index, tail_bytes
from data_pipeline.storage.byte_ranges import ByteRanges, LocalRanges


class _Decompressor(threading.local):
    """One zstd decompressor per thread, as it is not thread-safe."""

    def __init__(self, dictionary: bytes | None) -> None:
        made = None if dictionary is None else read_dictionary(dictionary)[1]
        self.zstd = zstandard.ZstdDecompressor(dict_data=made)


# Shared by thousands of shards: a decompressor takes more memory than a shard's index.
_decompressor = lru_cache(maxsize=3)(_Decompressor)


class ShardReader:
    """Reads the index of a shard on opening, and its frames on request, from any thread.

    `dictionary` is the one that the header names, if any. `expected_frames` is the number of frames
    in the manifest, so that one read of a remote file finds the index. With `vocab_size`, a frame
    with an id that is not below it is damaged. Raises ShardCorruptError, naming file, frame and
    byte offset, for anything malformed, and over a network SourceUnreadableError.

    The file is closed with the last reference, or by `close`, which no reading thread may overlap.
    """

    def __init__(
        self,
        file: Path | ByteRanges,
        dictionary: bytes | None = None,
        cache: CachedShard | None = None,
        expected_frames: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.shown = str(file) if isinstance(file, Path) else file.shown
        self._cache = cache
        self._vocab_size = vocab_size
        try:
            self._file = LocalRanges(file) if isinstance(file, Path) else file
            self.file_bytes, tail = self._file.tail(tail_bytes(expected_frames))
        except OSError as error:
            raise ShardCorruptError(
                f"cannot read the shard {self.shown}: {error.strerror}; "
                "restore it or build the shards again"
            ) from None
        try:
            self._index = read_index(self.file_bytes, partial(self._read_behind, tail))
        except ValueError as error:
            raise self._corrupt(str(error)) from None
        self.header = self._index.header
        self.num_frames = len(self._index.checksums)
        self.id_dtype: np.dtype[Any] = np.dtype(f"<u{self.header.id_bytes}")
        self._decompressor = self._require_decompressor(dictionary)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def frame(self, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Decode one frame, checksum verified: ids of shape (frame_tokens,); the last has fewer."""
        offset, end = self.frame_offsets[frame : frame + 2].tolist()
        num_bytes = end - offset
        if self._cache is not None and (kept := self._cache.get(frame, num_bytes)) is not None:
            try:
                return self._decode(frame, kept)
            except zstandard.ZstdError:
                self._cache.remove(frame)
        data = self._read_at(offset, num_bytes, f"frame {frame} at byte {offset}")
        try:
            ids = self._decode(frame, data)
        except zstandard.ZstdError as error:
            raise self._corrupt(
                f"frame {frame} at byte {offset} does not decode ({error})"
            ) from None
        if self._cache is not None:
            self._cache.put(frame, data)
        return ids

    @property
    def frame_offsets(self) -> npt.NDArray[np.int64]:
        """Offset of each frame in bytes and, last, of the end of the last one."""
        return self._index.offsets

    def document_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, markers and padding included: shape (documents,)."""
        return self.counts()[:, 0]

    def counts(self) -> npt.NDArray[np.int64]:
        """As `stored_counts`, but int64."""
        return self.stored_counts().astype(np.int64)

    def stored_counts(self) -> npt.NDArray[np.uint32]:
        """Number of tokens of each document, or the three numbers of each example.

        Shape (documents, 1) or (examples, 3). Read-only.
        """
        offset, num_bytes = self._index.counts_offset, self._index.counts_bytes
        columns = 1 if self.header.row_tokens is None else NUM_COUNTS
        data = self._read_at(offset, num_bytes, f"its document index at byte {offset}")
        try:
            if zstandard.frame_content_size(data) != COUNT_BYTES * self.header.num_counts:
                raise zstandard.ZstdError("its size is not that of the header's documents")
            raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._corrupt(f"its document index does not decode ({error})") from None
        counts = np.frombuffer(raw, dtype="<u4").reshape(-1, columns)
        tokens = counts[:, 0]
        if tokens.sum(dtype=np.int64) != self.header.tokens or not tokens.all():
            raise self._corrupt("its document index and its token count disagree")
        if self.header.row_tokens is not None:
            try:
                require_rows(counts, self.header.row_tokens)
            except ValueError as error:
                raise self._corrupt(f"its document index is malformed ({error})") from None
        return counts

    def text_tokens(self) -> npt.NDArray[np.integer[Any]]:
        """Tokens of each document, with markers and without padding: shape (documents,)."""
        counts = self.stored_counts()
        if self.header.row_tokens is None:
            return counts[:, 0]
        lengths: npt.NDArray[np.int64] = counts[:, 1:].sum(axis=1, dtype=np.int64)
        return lengths

    def marks(self, frame: int) -> npt.NDArray[np.uint8] | None:
        """Segment starts and loss flags of a frame of examples; None for documents."""
        if self.header.row_tokens is None:
            return None
        start = frame * self.header.frame_tokens
        stop = min(start + self.header.frame_tokens, self.header.tokens)
        return self._example_marks.between(start, stop)

    @cached_property
    def _example_marks(self) -> ExampleMarks:
        return ExampleMarks(self.counts())

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids from `start` to `stop` of the shard, across frames: shape (stop - start,)."""
        size = self.header.frame_tokens
        parts = []
        for frame in range(start // size, (stop + size - 1) // size):
            first = frame * size
            parts.append(self.frame(frame)[max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.id_dtype)

    def documents(self) -> Iterator[npt.NDArray[np.unsignedinteger[Any]]]:
        """Yield the ids of every document, markers included; each frame is decoded once."""
        frames = (self.frame(frame) for frame in range(self.num_frames))
        waiting: npt.NDArray[Any] = np.empty(0, dtype=self.id_dtype)
        start = 0
        for tokens in map(int, self.stored_counts()[:, 0]):
            parts = [waiting[start : start + tokens]]
            start += tokens
            while start > len(waiting):
                start -= len(waiting)
                waiting = next(frames)
                parts.append(waiting[:start])
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decode(self, frame: int, data: bytes) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Raises ZstdError."""
        # Checked before allocating: a damaged frame header may claim any size.
        head = zstandard.get_frame_parameters(data)
        if head.content_size != self._index.frame_bytes(frame):
            raise zstandard.ZstdError("its header and the seek table disagree on its size")
        if not head.has_checksum:
            raise zstandard.ZstdError("it has no checksum")
        raw = self._decompressor.zstd.decompress(data, allow_extra_data=False)
        # The decoder has verified the frame's own checksum.
        if data[-4:] != struct.pack("<I", self._index.checksums[frame]):
            raise zstandard.ZstdError("the seek table has another checksum")
        ids = np.frombuffer(raw, dtype=self.id_dtype)
        if self._vocab_size is not None and (largest := int(ids.max())) >= self._vocab_size:
            raise zstandard.ZstdError(f"its id {largest} is not below {self._vocab_size}")
        return ids

    def _corrupt(self, problem: str) -> ShardCorruptError:
        return ShardCorruptError(
            f"the shard {self.shown} is damaged: {problem}; restore it or build the shards again"
        )

    def _read_at(self, offset: int, num_bytes: int, what: str) -> bytes:
        try:
            data = self._file.read_at(offset, num_bytes)
        except OSError as error:
            raise self._corrupt(f"{what} cannot be read ({error.strerror})") from None
        if len(data) != num_bytes:
            raise self._corrupt(
                f"{what} cannot be read (the file ends within its {num_bytes} bytes)"
            )
        return data

    def _read_behind(self, tail: bytes, offset: int, num_bytes: int) -> bytes:
        """Bytes near the file's end, from the tail that is already fetched if they are in it."""
        start = offset - (self.file_bytes - len(tail))
        if 0 <= start <= len(tail) - num_bytes:
            return tail[start : start + num_bytes]
        return self._read_at(offset, num_bytes, f"its index at byte {offset}")

    def _require_decompressor(self, dictionary: bytes | None) -> _Decompressor:
        needed = self.header.dictionary_sha256
        if needed is None:
            return _decompressor(None)
        given = Compression(dictionary=dictionary)
        if given.dictionary_sha256 != needed:
            raise ShardCorruptError(
                f"the shard {self.shown} can only be read with the zstd dictionary {needed[:12]}, "
                f"not with {(given.dictionary_sha256 or 'none')[:12]}; "
                "restore the dictionary beside the shards, or the shard itself"
            )
        return _decompressor(dictionary)
