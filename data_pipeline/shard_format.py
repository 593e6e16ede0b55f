"""One shard: a `.zst` file of independently compressed frames of ids, with its index at the end.

Layout, in file order:
  frame 0 .. frame n-1   Zstandard frames with content checksums; each holds `frame_tokens`
                         little-endian ids, the last one perhaps fewer
  index                  skippable frame 0x184D2A5D: b"MEGABACK", u32 header bytes, the header
                         (JSON), and the zstd-compressed u32 token counts of the documents
  seek table             of the Zstandard seekable format (seekable.py), the index being its last
                         entry, with 0 decompressed bytes

`zstd -dc` yields the raw ids (`zstd -dc -D DICTIONARY`, if the header names one: the frames then
carry its id). The document index never needs the dictionary. A shard holds whole documents, markers
included, one after another.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import zstandard

from data_pipeline.errors import ShardCorruptError
from data_pipeline.seekable import (
    SKIPPABLE_HEADER,
    SeekEntry,
    pack_seek_table,
    read_seek_table,
    skippable_frame,
)

_INDEX_MAGIC = 0x184D2A5D
_INDEX_SIGNATURE = b"MEGABACK"
_VERSION = 1

DEFAULT_FRAME_TOKENS = 65_536
DEFAULT_LEVEL = 6


@dataclass(frozen=True)
class Compression:
    """How frames are compressed. It changes a file's bytes, never what is read from it."""

    level: int = DEFAULT_LEVEL
    long_distance: bool = False
    dictionary: bytes | None = None

    @property
    def dictionary_sha256(self) -> str | None:
        return None if self.dictionary is None else _dictionary(self.dictionary)[0]

    def zstd_dictionary(self) -> zstandard.ZstdCompressionDict | None:
        return None if self.dictionary is None else _dictionary(self.dictionary)[1]

    def compressor(self) -> zstandard.ZstdCompressor:
        """A compressor of frames, with content checksums, sizes and the dictionary's id."""
        # Given as a level, not as a table of numbers, so that zstd fits them to each frame's size.
        parameters = zstandard.ZstdCompressionParameters(
            compression_level=self.level,
            enable_ldm=self.long_distance,
            write_checksum=True,
            write_content_size=True,
            write_dict_id=True,
        )
        return zstandard.ZstdCompressor(
            compression_params=parameters, dict_data=self.zstd_dictionary()
        )


@lru_cache(maxsize=2)
def _dictionary(dictionary: bytes) -> tuple[str, zstandard.ZstdCompressionDict]:
    """Its SHA-256, and what zstd makes of it: once for all shards that are open."""
    # Never as raw content, whose frames would not say that they need it.
    made = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT)
    return hashlib.sha256(dictionary).hexdigest(), made


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
    dictionary_sha256: str | None = None

    @classmethod
    def from_json(cls, data: bytes) -> "ShardHeader":
        """Raises ValueError or TypeError unless every field is there and of its type."""
        header = cls(**json.loads(data))
        for field in fields(cls):
            value = getattr(header, field.name)
            if not isinstance(value, cast(type, field.type)):
                raise TypeError(f"{field.name} is {value!r:.80}")
        return header


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
        compression: Compression = Compression(),
    ) -> None:
        self._file = file
        self._identity = identity
        self._id_dtype = id_dtype
        self._frame_tokens = frame_tokens
        self._dictionary_sha256 = compression.dictionary_sha256
        self._compressor = compression.compressor()
        # Counts have nothing in common with ids, and can be read without the dictionary.
        self._index_compressor = replace(compression, dictionary=None).compressor()
        self._pending: list[npt.NDArray[Any]] = []
        self._pending_tokens = 0
        self._seek_entries: list[SeekEntry] = []
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
        self._append(document_ids)

    def add_shard(self, shard: "ShardReader") -> None:
        """Append every document of another shard, frame by frame."""
        self._document_tokens.extend(shard.document_tokens().tolist())
        self._text_bytes += shard.header.text_bytes
        for frame in range(shard.num_frames):
            self._append(shard.frame(frame))

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
            dictionary_sha256=self._dictionary_sha256,
        )
        header_json = json.dumps(asdict(header), sort_keys=True).encode()
        counts = np.array(self._document_tokens, dtype="<u4").tobytes()
        self._content_sha256.update(counts)
        size_of_header = struct.pack("<I", len(header_json))
        compressed_counts = self._index_compressor.compress(counts)
        index = skippable_frame(
            _INDEX_MAGIC, _INDEX_SIGNATURE + size_of_header + header_json + compressed_counts
        )
        self._write(index)
        self._seek_entries.append(SeekEntry(len(index), 0, 0))
        self._write(pack_seek_table(self._seek_entries))
        return ShardDigest(
            tokens=self.tokens,
            documents=len(self._document_tokens),
            text_bytes=self._text_bytes,
            file_bytes=self._file_bytes,
            file_sha256=self._file_sha256.hexdigest(),
            content_sha256=self._content_sha256.hexdigest(),
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
        # A frame's own checksum is the low half of XXH64 of its content: just what the table wants.
        (checksum,) = struct.unpack("<I", compressed[-4:])
        self._seek_entries.append(SeekEntry(len(compressed), len(raw), checksum))
        self._content_sha256.update(raw)
        self._write(compressed)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._file_bytes += len(data)
        self._file_sha256.update(data)


class ShardReader:
    """Reads the index of a shard at once and its frames on request.

    `dictionary` is the one that the header names, if it names one. Raises ShardCorruptError, naming
    file, frame and byte offset, for anything that is not what the format says.
    """

    def __init__(self, path: Path, dictionary: bytes | None = None) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ShardCorruptError(
                f"cannot read the shard {path}: {error.strerror}; build the shards again"
            ) from None
        try:
            self._read_ends(dictionary)
        except BaseException:
            self._file.close()
            raise

    def _read_ends(self, dictionary: bytes | None) -> None:
        self.file_bytes = self._file.seek(0, 2)
        try:
            entries = read_seek_table(self.file_bytes, self._read_at)
        except ValueError as error:
            raise self._corrupt(str(error)) from None
        compressed_bytes = [entry.compressed_bytes for entry in entries]
        self._offsets = np.concatenate([[0], np.cumsum(compressed_bytes, dtype=np.int64)])
        self._frames = entries[:-1]
        self.num_frames = len(self._frames)
        self.header, self._compressed_counts = self._read_index()
        self._check_header()
        self.id_dtype: np.dtype[Any] = np.dtype(f"<u{self.header.id_bytes}")
        self._decompressor = self._make_decompressor(dictionary)

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
        offset = int(self._offsets[frame])
        compressed_bytes = int(self._offsets[frame + 1]) - offset
        data = self._read_at(offset, compressed_bytes)
        try:
            # Before anything is allocated: a damaged head may claim any size.
            if zstandard.frame_content_size(data) != self._frames[frame].decompressed_bytes:
                raise zstandard.ZstdError("its head and the seek table disagree on its size")
            raw = self._decompressor.decompress(data, allow_extra_data=False)
            # The decoder has checked the frame's own copy.
            if data[-4:] != struct.pack("<I", self._frames[frame].checksum):
                raise zstandard.ZstdError("the seek table has another checksum")
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
            counts = zstandard.ZstdDecompressor().decompress(
                self._compressed_counts, allow_extra_data=False
            )
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

    def documents(self) -> Iterator[npt.NDArray[np.unsignedinteger[Any]]]:
        """The ids of every document, markers included; each frame is decoded once."""
        frames = (self.frame(frame) for frame in range(self.num_frames))
        waiting: npt.NDArray[Any] = np.empty(0, dtype=self.id_dtype)
        start = 0
        for tokens in self.document_tokens().tolist():
            parts = [waiting[start : start + tokens]]
            start += tokens
            while start > len(waiting):
                start -= len(waiting)
                waiting = next(frames)
                parts.append(waiting[:start])
            yield parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _corrupt(self, problem: str) -> ShardCorruptError:
        return ShardCorruptError(
            f"the shard {self.path} is damaged: {problem}; restore it or build the shards again"
        )

    def _read_at(self, offset: int, size: int) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(size)
        except OSError as error:
            raise self._corrupt(
                f"the {size} bytes at byte {offset} cannot be read ({error.strerror})"
            ) from None
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
        if full + (rest > 0) != self.num_frames:  # before a list of a false length is made
            raise self._corrupt(f"its header speaks of {header.tokens} tokens, too many or too few")
        tokens = [header.frame_tokens] * full + [rest] * (rest > 0)
        frame_bytes = [entry.decompressed_bytes for entry in self._frames]
        if frame_bytes != [header.id_bytes * number for number in tokens]:
            raise self._corrupt("its frames and its header disagree on the number of tokens")

    def _make_decompressor(self, dictionary: bytes | None) -> zstandard.ZstdDecompressor:
        needed = self.header.dictionary_sha256
        if needed is None:
            return zstandard.ZstdDecompressor()
        given = Compression(dictionary=dictionary)
        if given.dictionary_sha256 != needed:
            raise ShardCorruptError(
                f"the shard {self.path} can only be read with the zstd dictionary {needed[:12]}, "
                f"not with {(given.dictionary_sha256 or 'none')[:12]}; "
                "restore the dictionary beside the shards, or the shard itself"
            )
        return zstandard.ZstdDecompressor(dict_data=given.zstd_dictionary())

    def _read_index(self) -> tuple[ShardHeader, bytes]:
        offset = int(self._offsets[-2])
        data = self._read_at(offset, int(self._offsets[-1]) - offset)
        try:
            magic, index_bytes = SKIPPABLE_HEADER.unpack_from(data)
            body = data[SKIPPABLE_HEADER.size :]
            if magic != _INDEX_MAGIC or index_bytes != len(body):
                raise ValueError("no index frame")
            if body[: len(_INDEX_SIGNATURE)] != _INDEX_SIGNATURE:
                raise ValueError("no signature")
            (header_bytes,) = struct.unpack_from("<I", body, len(_INDEX_SIGNATURE))
            start = len(_INDEX_SIGNATURE) + 4
            header = ShardHeader.from_json(body[start : start + header_bytes])
        except (ValueError, TypeError, struct.error) as error:
            raise self._corrupt(f"its index at byte {offset} is malformed ({error})") from None
        return header, body[start + header_bytes :]
