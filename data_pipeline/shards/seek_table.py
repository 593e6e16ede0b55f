"""The seek table of the Zstandard seekable format, version 0.1.0, with checksums.

Specified in facebook/zstd, contrib/seekable_format/zstd_seekable_compression_format.md. The table
is a skippable frame at the end of a file; integers are little-endian.
"""

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.common.limits import MAX_FRAMES

SKIPPABLE_HEADER = struct.Struct("<II")
"""Magic number and content size of a skippable frame."""

EMPTY_CHECKSUM = 0x51D8E999
"""Low half of XXH64 of no bytes: the checksum of a skippable frame, whose content is empty."""

_TABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_CHECKSUMS_FLAG = 1 << 7
_ENTRY = struct.Struct("<III")
_ENTRIES = np.dtype(
    [("compressed_bytes", "<u4"), ("decompressed_bytes", "<u4"), ("checksum", "<u4")]
)
_FOOTER = struct.Struct("<IBI")


class SeekEntry(NamedTuple):
    """One frame; the checksum is the low half of XXH64 of its content."""

    compressed_bytes: int
    decompressed_bytes: int
    checksum: int


def skippable_frame(magic: int, content: bytes) -> bytes:
    return SKIPPABLE_HEADER.pack(magic, len(content)) + content


def pack_seek_table(entries: Iterable[SeekEntry]) -> bytes:
    """The skippable frame that ends the file."""
    packed = [_ENTRY.pack(*entry) for entry in entries]
    footer = _FOOTER.pack(len(packed), _CHECKSUMS_FLAG, _SEEKABLE_MAGIC)
    return skippable_frame(_TABLE_MAGIC, b"".join([*packed, footer]))


def seek_table_bytes(num_entries: int) -> int:
    """Size of a whole table in bytes."""
    return SKIPPABLE_HEADER.size + num_entries * _ENTRY.size + _FOOTER.size


def read_seek_table(file_bytes: int, read_at: Callable[[int, int], bytes]) -> npt.NDArray[Any]:
    """The entries of a file's frames, at least one; their sizes add up to the file's.

    `read_at(offset, size)` returns the file's bytes. The array's fields are those of SeekEntry.
    Raises ValueError with what is malformed.
    """
    if file_bytes < _FOOTER.size:
        raise ValueError(f"it has only {file_bytes} bytes")
    footer = read_at(file_bytes - _FOOTER.size, _FOOTER.size)
    num_entries, descriptor, magic = _FOOTER.unpack(footer)
    if magic != _SEEKABLE_MAGIC or descriptor != _CHECKSUMS_FLAG:
        raise ValueError("it does not end with a seek table, so it was truncated or altered")
    table_bytes = num_entries * _ENTRY.size + _FOOTER.size
    start = file_bytes - table_bytes - SKIPPABLE_HEADER.size
    if not 1 <= num_entries <= MAX_FRAMES + 1 or start < 0:  # the index has an entry too
        raise ValueError(
            f"its seek table, which ends at byte {file_bytes}, claims {num_entries} frames"
        )
    table = read_at(start, table_bytes + SKIPPABLE_HEADER.size)
    if SKIPPABLE_HEADER.unpack_from(table) != (_TABLE_MAGIC, table_bytes):
        raise ValueError(f"its seek table at byte {start} is malformed")
    entries = np.frombuffer(table[SKIPPABLE_HEADER.size : -_FOOTER.size], dtype=_ENTRIES)
    if entries["compressed_bytes"].sum(dtype=np.int64) != start:
        raise ValueError(f"its seek table at byte {start} does not add up to the file's size")
    return entries
