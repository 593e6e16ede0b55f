"""The parts of a shard, to change and join again without checks."""

import json
import struct
from dataclasses import dataclass, field
from typing import Any

import zstandard

from data_pipeline.shards.seek_table import (
    EMPTY_CHECKSUM,
    SeekEntry,
    pack_seek_table,
    skippable_frame,
)

_INDEX_MAGIC = 0x184D2A5D


@dataclass(kw_only=True)
class ShardParts:
    """The bytes of the frames, the header, the compressed counts, and the seek table's entries."""

    frames: bytes
    header: dict[str, Any]
    counts: bytes
    entries: list[SeekEntry]
    header_json: bytes | None = None
    """Overrides `header`, if given."""
    seek_table: bytes | None = None
    more_entries: list[SeekEntry] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes) -> "ShardParts":
        (num_entries,) = struct.unpack("<I", data[-9:-5])
        start = len(data) - 9 - 12 * num_entries
        entries = [SeekEntry(*entry) for entry in struct.iter_unpack("<III", data[start:-9])]
        *frames, index = entries
        stop = sum(entry.compressed_bytes for entry in frames)
        content = data[stop + 8 : stop + index.compressed_bytes]
        (header_bytes,) = struct.unpack("<I", content[8:12])
        header = json.loads(content[12 : 12 + header_bytes])
        return cls(
            frames=data[:stop], header=header, counts=content[12 + header_bytes :], entries=frames
        )

    def joined(self) -> bytes:
        header = self.header_json or json.dumps(self.header).encode()
        size = struct.pack("<I", len(header))
        index = skippable_frame(_INDEX_MAGIC, b"MEGABACK" + size + header + self.counts)
        entries = [*self.entries, SeekEntry(len(index), 0, EMPTY_CHECKSUM), *self.more_entries]
        return self.frames + index + (self.seek_table or pack_seek_table(entries))


def compressed_zeros(num_bytes: int) -> bytes:
    """A Zstandard frame of `num_bytes` zeros, made without holding them in memory."""
    compressor = zstandard.ZstdCompressor(level=3, write_content_size=True, write_checksum=True)
    chunker = compressor.compressobj(size=num_bytes)
    block = bytes(1 << 20)
    parts = [chunker.compress(block) for _ in range(num_bytes >> 20)]
    parts.append(chunker.compress(block[: num_bytes & ((1 << 20) - 1)]))
    return b"".join([*parts, chunker.flush()])
