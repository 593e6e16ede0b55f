"""Shard index: the header and the offsets of the frames, at the end of the file.

It takes one read of the file's tail and, if the document index is large, one more.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.common.checked_json import briefly, made_from, parse_json, require_within
from data_pipeline.common.limits import (
    ID_BYTES,
    MAX_COUNTS,
    MAX_FRAME_TOKENS,
    MAX_HEADER_BYTES,
    MAX_SHARD_TOKENS,
)
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.shards.examples import NUM_COUNTS
from data_pipeline.shards.seek_table import (
    SKIPPABLE_HEADER,
    read_seek_table,
    seek_table_bytes,
    skippable_frame,
)

VERSION = 1
"""Version of shards of documents."""
EXAMPLES_VERSION = 2
"""Version of shards of examples in rows."""

COUNT_BYTES = 4
"""Size of a number in the document index, in bytes."""
_INDEX_MAGIC = 0x184D2A5D
_INDEX_SIGNATURE = b"MEGABACK"
_PREFIX = struct.Struct("<II8sI")
"""Beginning of the index: the skippable frame's magic number and size, the signature, the header's
size."""
_HEADER_BYTES = 1024
"""Bytes to fetch for the prefix and the header; they usually take less."""
_TAIL_BYTES = 1 << 12
_MAX_TEXT_CHARACTERS = 64
"""Length of a SHA-256 in hex, the longest of the header's texts."""
_SLACK_BYTES = 1024
"""Maximum growth by compression, in bytes, of a short content; a long one does not double."""


@dataclass(frozen=True)
class ShardHeader:
    """A shard's description of itself, by which a file of another data set is recognized."""

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
    row_tokens: int | None = None
    """Length in tokens of the rows that no instruction example crosses; None for documents."""

    @property
    def num_counts(self) -> int:
        """Numbers in the document index."""
        return self.documents * (1 if self.row_tokens is None else NUM_COUNTS)

    def to_json(self) -> bytes:
        values = asdict(self)
        if self.row_tokens is None:
            del values["row_tokens"]
        return json.dumps(values, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ShardHeader":
        """Raises ValueError or TypeError unless every field is present and of its type."""
        header = made_from(cls, parse_json(data))
        for name in ("direction", "unit", "tokenizer_sha256", "dictionary_sha256"):
            if len(getattr(header, name) or "") > _MAX_TEXT_CHARACTERS:
                raise ValueError(f"{name} is {briefly(getattr(header, name))}")
        return header


@dataclass(frozen=True)
class ShardIndex:
    """A shard's header, and the offsets of its frames and of its document index."""

    header: ShardHeader
    offsets: npt.NDArray[np.int64]
    """Offsets of every frame and, last, of the index: shape (frames + 1,)."""
    checksums: npt.NDArray[np.uint32]
    """Checksums of the content of every frame: shape (frames,)."""
    counts_offset: int
    counts_bytes: int

    def frame_bytes(self, frame: int) -> int:
        """Decompressed bytes of a frame: the last one may be short."""
        header = self.header
        before = frame * header.frame_tokens
        return header.id_bytes * min(header.frame_tokens, header.tokens - before)


def tail_bytes(num_frames: int) -> int:
    """Number of bytes at the end of a file that hold the seek table of `num_frames` frames."""
    return max(_TAIL_BYTES, seek_table_bytes(num_frames + 1))


def pack_index(header: ShardHeader, compressed_counts: bytes) -> bytes:
    """The frame between the frames of ids and the seek table."""
    header_json = header.to_json()
    size_of_header = struct.pack("<I", len(header_json))
    return skippable_frame(
        _INDEX_MAGIC, _INDEX_SIGNATURE + size_of_header + header_json + compressed_counts
    )


def read_index(file_bytes: int, read_at: Callable[[int, int], bytes]) -> ShardIndex:
    """The index of a file; `read_at(offset, size)` returns its bytes.

    Raises ValueError with what is malformed.
    """
    entries = read_seek_table(file_bytes, read_at)
    ends = np.cumsum(entries["compressed_bytes"], dtype=np.int64)
    offset = int(ends[-2]) if len(ends) > 1 else 0
    header, header_end = _read_header(offset, int(ends[-1]), read_at)
    _check_ranges(header)
    frames = entries[:-1]
    counts_bytes = int(ends[-1]) - header_end
    frame_bytes = frames["decompressed_bytes"].astype(np.int64)
    _check_sizes(header, frame_bytes)
    if (
        frames["compressed_bytes"] > 2 * frame_bytes + _SLACK_BYTES
    ).any() or counts_bytes > 2 * COUNT_BYTES * header.num_counts + _SLACK_BYTES:
        raise ValueError("its frames are larger than their content")
    return ShardIndex(
        header=header,
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]),
        checksums=frames["checksum"].copy(),
        counts_offset=header_end,
        counts_bytes=counts_bytes,
    )


def _read_header(
    offset: int, stop: int, read_at: Callable[[int, int], bytes]
) -> tuple[ShardHeader, int]:
    """The header of the index at `offset`, and the offset after it."""
    head = read_at(offset, min(_HEADER_BYTES, stop - offset))
    try:
        magic, content_bytes, signature, header_bytes = _PREFIX.unpack_from(head)
        if magic != _INDEX_MAGIC or content_bytes != stop - offset - SKIPPABLE_HEADER.size:
            raise ValueError("no index frame")
        if signature != _INDEX_SIGNATURE:
            raise ValueError("no signature")
        end = _PREFIX.size + header_bytes
        if header_bytes > MAX_HEADER_BYTES or end > stop - offset:
            raise ValueError(f"a header of {header_bytes} bytes")
        if end > len(head):
            head = read_at(offset, end)
        return ShardHeader.from_json(head[_PREFIX.size : end]), offset + end
    except (ValueError, TypeError, struct.error) as error:
        raise ValueError(f"its index at byte {offset} is malformed ({error})") from None


def _check_ranges(header: ShardHeader) -> None:
    """Raises ValueError for numbers that are out of range or contradict each other."""
    version = VERSION if header.row_tokens is None else EXAMPLES_VERSION
    if header.version != version:
        raise ValueError(f"its version is {briefly(header.version)}, not {version}")
    if header.id_bytes not in ID_BYTES:
        raise ValueError(f"id_bytes is {briefly(header.id_bytes)}")
    require_within("frame_tokens", header.frame_tokens, 1, MAX_FRAME_TOKENS)
    if header.row_tokens is not None:
        require_within("row_tokens", header.row_tokens, 1, header.frame_tokens)
        if header.frame_tokens % header.row_tokens:
            raise ValueError("its rows do not fit its frames")
    require_within("tokens", header.tokens, 0, MAX_SHARD_TOKENS)
    require_within("documents", header.documents, 0, header.tokens)
    require_within("text_bytes", header.text_bytes, 0, INT64_MAX)
    require_within("numbers of its document index", header.num_counts, 0, MAX_COUNTS)


def _check_sizes(header: ShardHeader, frame_bytes: npt.NDArray[np.int64]) -> None:
    """Raises ValueError unless the frames hold the header's number of tokens."""
    full, rest = divmod(header.tokens, header.frame_tokens)
    if full + (rest > 0) != len(frame_bytes):
        raise ValueError(f"its header has {header.tokens} tokens, too many or too few")
    is_full = not full or frame_bytes[:full].min() == frame_bytes[:full].max() == (
        header.id_bytes * header.frame_tokens
    )
    if not is_full or (rest and frame_bytes[-1] != header.id_bytes * rest):
        raise ValueError("its frames and its header disagree on the number of tokens")
