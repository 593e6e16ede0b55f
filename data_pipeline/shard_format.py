"""One shard: a `.zst` file of independently compressed frames of ids, with its index at the end.

Layout, in file order:
  frame 0 .. frame n-1   Zstandard frames with content checksums; each holds `frame_tokens`
                         little-endian ids, the last one perhaps fewer
  index                  skippable frame 0x184D2A5D: b"MEGABACK", u32 header bytes, the header
                         (JSON), and the zstd-compressed u32 token counts of the documents
  seek table             skippable frame 0x184D2A5E of the Zstandard seekable format, version 0.1.0
                         (facebook/zstd, contrib/seekable_format): u32 compressed bytes, u32
                         decompressed bytes and u32 checksum (low half of XXH64) for every frame,
                         the index included with 0 decompressed bytes

`zstd -dc` yields the raw ids. A shard holds whole documents, markers included, one after another.
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import zstandard

from data_pipeline.errors import ShardCorruptError

_INDEX_MAGIC = 0x184D2A5D
_SEEK_TABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_INDEX_SIGNATURE = b"MEGABACK"
_VERSION = 1
_CHECKSUMS_FLAG = 1 << 7
_ENTRY = struct.Struct("<III")
_FOOTER = struct.Struct("<IBI")
_SKIPPABLE_HEADER = struct.Struct("<II")

DEFAULT_FRAME_TOKENS = 65_536


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says about itself, so that a file that strayed is recognised."""

    version: int
    direction: str
    unit: str
    tokenizer_sha256: str
    id_bytes: int
    frame_tokens: int
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class ShardDigest:
    """Sizes and hashes of a written shard, for the manifest."""

    tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    file_sha256: str
    content_sha256: str


class ShardWriter:
    """Writes one shard to an open file. The caller makes the file appear under its final name.

    `identity` gives direction, unit and tokenizer_sha256. Documents come as ids with markers.
    """

    def __init__(
        self,
        file: IO[bytes],
        identity: dict[str, str],
        id_dtype: np.dtype[Any],
        frame_tokens: int = DEFAULT_FRAME_TOKENS,
        compression_level: int = 3,
    ) -> None:
        self._file = file
        self._identity = identity
        self._id_dtype = id_dtype
        self._frame_tokens = frame_tokens
        self._compressor = zstandard.ZstdCompressor(
            level=compression_level, write_checksum=True, write_content_size=True
        )
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_tokens = 0
        self._seek_entries: list[bytes] = []
        self._document_tokens: list[int] = []
        self._text_bytes = 0
        self._file_bytes = 0
        self._file_sha256 = hashlib.sha256()
        self._content_sha256 = hashlib.sha256()
        self.tokens = 0

    def add(self, document_ids: npt.NDArray[Any], text_bytes: int) -> None:
        """Append a document; whole frames are compressed and written as they fill."""
        self._document_tokens.append(len(document_ids))
        self._text_bytes += text_bytes
        self.tokens += len(document_ids)
        self._pending.append(np.ascontiguousarray(document_ids, dtype=self._id_dtype))
        self._pending_tokens += len(document_ids)
        if self._pending_tokens >= self._frame_tokens:
            waiting = np.concatenate(self._pending)
            whole_tokens = len(waiting) - len(waiting) % self._frame_tokens
            for start in range(0, whole_tokens, self._frame_tokens):
                self._write_frame(waiting[start : start + self._frame_tokens])
            self._pending = [waiting[whole_tokens:]]
            self._pending_tokens = len(waiting) - whole_tokens

    def finish(self) -> ShardDigest:
        """Write the last frame, the index and the seek table."""
        if self._pending_tokens:
            self._write_frame(np.concatenate(self._pending))
        header = ShardHeader(
            version=_VERSION,
            **self._identity,
            id_bytes=self._id_dtype.itemsize,
            frame_tokens=self._frame_tokens,
            tokens=self.tokens,
            documents=len(self._document_tokens),
            text_bytes=self._text_bytes,
        )
        header_json = json.dumps(asdict(header), sort_keys=True).encode()
        counts = np.array(self._document_tokens, dtype="<u4").tobytes()
        self._content_sha256.update(counts)
        index = b"".join(
            [
                _INDEX_SIGNATURE,
                struct.pack("<I", len(header_json)),
                header_json,
                self._compressor.compress(counts),
            ]
        )
        self._write(_SKIPPABLE_HEADER.pack(_INDEX_MAGIC, len(index)) + index)
        self._seek_entries.append(_ENTRY.pack(len(index) + _SKIPPABLE_HEADER.size, 0, 0))
        table = b"".join(self._seek_entries) + _FOOTER.pack(
            len(self._seek_entries), _CHECKSUMS_FLAG, _SEEKABLE_MAGIC
        )
        self._write(_SKIPPABLE_HEADER.pack(_SEEK_TABLE_MAGIC, len(table)) + table)
        return ShardDigest(
            tokens=self.tokens,
            documents=len(self._document_tokens),
            text_bytes=self._text_bytes,
            file_bytes=self._file_bytes,
            file_sha256=self._file_sha256.hexdigest(),
            content_sha256=self._content_sha256.hexdigest(),
        )

    def _write_frame(self, ids: npt.NDArray[Any]) -> None:
        raw = ids.tobytes()
        compressed = self._compressor.compress(raw)
        # A frame's own checksum is the low half of XXH64 of its content: just what the table wants.
        (checksum,) = struct.unpack("<I", compressed[-4:])
        self._seek_entries.append(_ENTRY.pack(len(compressed), len(raw), checksum))
        self._content_sha256.update(raw)
        self._write(compressed)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file_bytes += len(data)
        self._file_sha256.update(data)


class ShardReader:
    """Reads the index of a shard at once and its frames on request.

    Raises ShardCorruptError, naming file, frame and byte offset, for anything that is not what the
    format says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ShardCorruptError(
                f"cannot read the shard {path}: {error.strerror}; build the shards again"
            ) from None
        self.file_bytes = self._file.seek(0, 2)
        entries = self._read_seek_table()
        compressed = [entry[0] for entry in entries]
        self._offsets = np.concatenate([[0], np.cumsum(compressed, dtype=np.int64)])
        self._frame_bytes = [entry[1] for entry in entries[:-1]]
        self.num_frames = len(entries) - 1
        self.header, self._compressed_counts = self._read_index()
        self._check_header()
        self.id_dtype: np.dtype[Any] = np.dtype(f"<u{self.header.id_bytes}")
        self._decompressor = zstandard.ZstdDecompressor()

    def close(self) -> None:
        self._file.close()

    def frame(self, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Decode one frame, checksum verified: ids of shape (frame_tokens,); the last has fewer."""
        offset = int(self._offsets[frame])
        compressed_bytes = int(self._offsets[frame + 1]) - offset
        data = self._read_at(offset, compressed_bytes)
        try:
            # Before anything is allocated: a damaged head may claim any size.
            if zstandard.frame_content_size(data) != self._frame_bytes[frame]:
                raise zstandard.ZstdError("its head and the seek table disagree on its size")
            raw = self._decompressor.decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._corrupt(
                f"frame {frame} at byte {offset} does not decode ({error})"
            ) from None
        return np.frombuffer(raw, dtype=self.id_dtype)

    def document_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, markers included: shape (documents,)."""
        try:
            if zstandard.frame_content_size(self._compressed_counts) != 4 * self.header.documents:
                raise zstandard.ZstdError("its size is not that of the header's documents")
            counts = self._decompressor.decompress(self._compressed_counts, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._corrupt(f"its document index does not decode ({error})") from None
        document_tokens = np.frombuffer(counts, dtype="<u4").astype(np.int64)
        if document_tokens.sum() != self.header.tokens:
            raise self._corrupt("its document index and its token count disagree")
        return document_tokens

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Ids from `start` to `stop` of the shard, across frames: shape (stop - start,)."""
        size = self.header.frame_tokens
        parts = []
        for frame in range(start // size, (stop + size - 1) // size):
            first = frame * size
            parts.append(self.frame(frame)[max(start - first, 0) : stop - first])
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.id_dtype)

    def content_sha256(self) -> str:
        """Decode every frame and hash ids and document index, as the writer did."""
        digest = hashlib.sha256()
        for frame in range(self.num_frames):
            digest.update(self.frame(frame).tobytes())
        digest.update(self.document_tokens().astype("<u4").tobytes())
        return digest.hexdigest()

    def _corrupt(self, problem: str) -> ShardCorruptError:
        return ShardCorruptError(
            f"the shard {self.path} is damaged: {problem}; restore it or build the shards again"
        )

    def _read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise self._corrupt(f"it ends within the {size} bytes at byte {offset}")
        return data

    def _check_header(self) -> None:
        header = self.header
        if header.version != _VERSION:
            raise self._corrupt(f"its version is {header.version}, not {_VERSION}")
        if header.id_bytes not in (2, 4) or header.frame_tokens < 1:
            raise self._corrupt("its header has a number out of range")
        full, rest = divmod(header.tokens, header.frame_tokens)
        tokens = [header.frame_tokens] * full + [rest] * (rest > 0)
        if self._frame_bytes != [header.id_bytes * number for number in tokens]:
            raise self._corrupt("its frames and its header disagree on the number of tokens")

    def _read_seek_table(self) -> list[tuple[int, int, int]]:
        if self.file_bytes < _FOOTER.size:
            raise self._corrupt(f"it has only {self.file_bytes} bytes")
        num_entries, descriptor, magic = _FOOTER.unpack(
            self._read_at(self.file_bytes - _FOOTER.size, _FOOTER.size)
        )
        if magic != _SEEKABLE_MAGIC or descriptor != _CHECKSUMS_FLAG:
            raise self._corrupt("it does not end with a seek table, so it was cut short or altered")
        table_bytes = num_entries * _ENTRY.size + _FOOTER.size
        start = self.file_bytes - table_bytes - _SKIPPABLE_HEADER.size
        if num_entries < 1 or start < 0:
            raise self._corrupt(f"its seek table claims {num_entries} frames")
        table = self._read_at(start, table_bytes + _SKIPPABLE_HEADER.size)
        if _SKIPPABLE_HEADER.unpack_from(table) != (_SEEK_TABLE_MAGIC, table_bytes):
            raise self._corrupt(f"its seek table at byte {start} is malformed")
        entries: list[tuple[int, int, int]] = list(
            _ENTRY.iter_unpack(table[_SKIPPABLE_HEADER.size : -_FOOTER.size])
        )
        if sum(entry[0] for entry in entries) != start:
            raise self._corrupt("its seek table does not add up to the file's size")
        return entries

    def _read_index(self) -> tuple[ShardHeader, bytes]:
        offset = int(self._offsets[-2])
        data = self._read_at(offset, int(self._offsets[-1]) - offset)
        try:
            magic, index_bytes = _SKIPPABLE_HEADER.unpack_from(data)
            body = data[_SKIPPABLE_HEADER.size :]
            if magic != _INDEX_MAGIC or index_bytes != len(body):
                raise ValueError("no index frame")
            if body[: len(_INDEX_SIGNATURE)] != _INDEX_SIGNATURE:
                raise ValueError("no signature")
            (header_bytes,) = struct.unpack_from("<I", body, len(_INDEX_SIGNATURE))
            start = len(_INDEX_SIGNATURE) + 4
            header = ShardHeader(**json.loads(body[start : start + header_bytes]))
        except (ValueError, TypeError, struct.error) as error:
            raise self._corrupt(f"its index at byte {offset} is malformed ({error})") from None
        return header, body[start + header_bytes :]
