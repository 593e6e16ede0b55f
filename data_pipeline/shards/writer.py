"""Shard writer: a `.zst` file of independently compressed frames of ids, with an index at the end.

Layout, in file order:
  frame 0 .. frame n-1   Zstandard frames with content checksums; each holds `frame_tokens`
                         little-endian ids, the last one perhaps fewer
  index                  skippable frame 0x184D2A5D: b"MEGABACK", u32 header bytes, the header
                         (JSON), and the zstd-compressed u32 token counts of the documents;
                         for examples in rows (examples.py), three counts each
  seek table             of the Zstandard seekable format (seek_table.py), the index being its last
                         entry, with 0 decompressed bytes

`zstd -dc` outputs the raw ids (`zstd -dc -D DICTIONARY`, if the header names one: the frames then
carry its id). The document index never needs the dictionary. A shard holds whole documents, markers
included, one after another.
"""

import hashlib
import struct
from array import array
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.interrupts import require_uninterrupted
from data_pipeline.common.limits import MAX_COUNTS, MAX_FRAMES
from data_pipeline.shards.compression import DEFAULT_COMPRESSION, Compression
from data_pipeline.shards.examples import NUM_COUNTS, PackedExample
from data_pipeline.shards.index import EXAMPLES_VERSION, VERSION, ShardHeader, pack_index
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.seek_table import EMPTY_CHECKSUM, SeekEntry, pack_seek_table

DEFAULT_FRAME_TOKENS = 65_536


@dataclass(frozen=True)
class ShardDigest:
    """Sizes and hashes of a written shard, for the manifest."""

    tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    file_sha256: str
    content_sha256: str
    loss_tokens: int = 0
    """Tokens of examples with loss."""
    padding_tokens: int = 0
    """Tokens that fill rows of examples."""


class ShardWriter:
    """Writes one shard to an open file. The caller gives the file its final name.

    `identity` has direction, unit and tokenizer_sha256. Documents are ids with markers or, with
    `row_tokens`, examples that fill one row after another.
    """

    def __init__(
        self,
        file: IO[bytes],
        identity: dict[str, str],
        id_dtype: np.dtype[Any],
        frame_tokens: int = DEFAULT_FRAME_TOKENS,
        compression: Compression = DEFAULT_COMPRESSION,
        row_tokens: int | None = None,
    ) -> None:
        self._row_tokens = row_tokens
        self._file = file
        self._identity = identity
        self._id_dtype = id_dtype
        self._frame_tokens = frame_tokens
        self._dictionary_sha256 = compression.dictionary_sha256
        self._compressor = compression.compressor()
        # No dictionary: counts do not resemble ids, and stay readable without it.
        self._index_compressor = replace(compression, dictionary=None).compressor()
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_tokens = 0
        self._seek_entries: list[SeekEntry] = []
        self._counts = array("I")  # one per document, three per example
        self._documents = self._loss_tokens = self._padding_tokens = 0
        self._text_bytes = 0
        self._file_bytes = 0
        self._file_sha256 = hashlib.sha256()
        self._content_sha256 = hashlib.sha256()
        self.tokens = 0

    def add(self, document_ids: npt.NDArray[Any], text_bytes: int) -> None:
        """Append a document; whole frames are compressed and written as they fill."""
        self._counts.append(len(document_ids))
        self._documents += 1
        self._text_bytes += text_bytes
        self._append(document_ids)

    def add_example(self, example: PackedExample) -> None:
        """Append an example, which must not cross a row's end."""
        self._counts.extend([len(example.ids), example.num_given, example.num_loss_tokens])
        self._documents += 1
        self._loss_tokens += example.num_loss_tokens
        self._padding_tokens += len(example.ids) - example.num_given - example.num_loss_tokens
        self._text_bytes += example.text_bytes
        self._append(example.ids)

    def add_shard(self, shard: ShardReader) -> None:
        """Append every document of another shard, frame by frame."""
        counts = shard.stored_counts()
        self._counts.frombytes(counts.astype(np.uint32).tobytes())
        if self._row_tokens is not None:
            tokens, given, loss_tokens = counts.sum(axis=0, dtype=np.int64).tolist()
            self._loss_tokens += loss_tokens
            self._padding_tokens += tokens - given - loss_tokens
        self._documents += shard.header.documents
        self._text_bytes += shard.header.text_bytes
        for frame in range(shard.num_frames):
            require_uninterrupted()
            self._append(shard.frame(frame))

    @property
    def is_full(self) -> bool:
        """Whether the limits of the format allow no further document."""
        return (
            len(self._counts) + NUM_COUNTS > MAX_COUNTS
            or len(self._seek_entries) > MAX_FRAMES // 2  # a document may be long
        )

    def finish(self) -> ShardDigest:
        """Write the last frame, the index and the seek table."""
        if self._pending_tokens:
            self._write_frame(np.concatenate(self._pending))
        header = ShardHeader(
            version=VERSION if self._row_tokens is None else EXAMPLES_VERSION,
            **self._identity,
            id_bytes=self._id_dtype.itemsize,
            frame_tokens=self._frame_tokens,
            tokens=self.tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            dictionary_sha256=self._dictionary_sha256,
            row_tokens=self._row_tokens,
        )
        counts = np.frombuffer(self._counts, dtype=np.uint32).astype("<u4").tobytes()
        self._content_sha256.update(counts)
        index = pack_index(header, self._index_compressor.compress(counts))
        self._write(index)
        self._seek_entries.append(SeekEntry(len(index), 0, EMPTY_CHECKSUM))
        self._write(pack_seek_table(self._seek_entries))
        return ShardDigest(
            tokens=self.tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            file_bytes=self._file_bytes,
            file_sha256=self._file_sha256.hexdigest(),
            content_sha256=self._content_sha256.hexdigest(),
            loss_tokens=self._loss_tokens,
            padding_tokens=self._padding_tokens,
        )

    def _append(self, ids: npt.NDArray[Any]) -> None:
        self.tokens += len(ids)
        self._pending.append(np.ascontiguousarray(ids, dtype=self._id_dtype))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= self._frame_tokens:
            waiting = np.concatenate(self._pending)
            whole_tokens = len(waiting) - len(waiting) % self._frame_tokens
            for start in range(0, whole_tokens, self._frame_tokens):
                self._write_frame(waiting[start : start + self._frame_tokens])
            self._pending = [waiting[whole_tokens:]]
            self._pending_tokens = len(waiting) - whole_tokens

    def _write_frame(self, ids: npt.NDArray[Any]) -> None:
        raw = ids.tobytes()
        compressed = self._compressor.compress(raw)
        # A frame's own checksum is the one of the seek table: the low half of XXH64 of its content.
        (checksum,) = struct.unpack("<I", compressed[-4:])
        self._seek_entries.append(SeekEntry(len(compressed), len(raw), checksum))
        self._content_sha256.update(raw)
        self._write(compressed)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file_bytes += len(data)
        self._file_sha256.update(data)
