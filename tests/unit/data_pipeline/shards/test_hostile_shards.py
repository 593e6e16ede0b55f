"""Hostile shards: one error, at once, and no memory for what they claim."""

import json
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from data_pipeline.errors import ShardCorruptError
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.shards import inspection
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.seek_table import SeekEntry
from tests.helpers.shard_parts import ShardParts, compressed_zeros
from tests.helpers.size_bounds import SHARD, agree, change_shard, refused, within_bounds


def set_header(**changed: object) -> Callable[[ShardParts], object]:
    return lambda parts: parts.header.update(changed)


def table(num_entries: int, entries: bytes = b"") -> bytes:
    content = entries + struct.pack("<IBI", num_entries, 0x80, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(content)) + content


def many_documents(parts: ShardParts) -> None:
    """A hundred frames of 2**24 ids and 2**30 documents, in a file of some kilobytes."""
    parts.header.update(frame_tokens=1 << 24, tokens=100 << 24, documents=1 << 30)
    parts.entries = [SeekEntry(0, 2 << 24, 0)] * 99 + [SeekEntry(len(parts.frames), 2 << 24, 0)]
    parts.counts = compressed_zeros(1 << 26)


def empty_documents(parts: ShardParts) -> None:
    documents = parts.header["tokens"]
    parts.header.update(documents=documents)
    parts.counts = compressed_zeros(4 * documents)


def giant_frame(parts: ShardParts) -> None:
    """A frame whose header claims 2**50 bytes."""
    head = struct.pack("<IBQ", 0xFD2FB528, 0b11100100, 1 << 50)
    parts.frames = head + parts.frames[len(head) :]


def unknown_size(parts: ShardParts) -> None:
    compressor = zstd_without_size()
    raw = bytes(parts.entries[0].decompressed_bytes)
    first = compressor.compress(raw)
    parts.frames = first + parts.frames[parts.entries[0].compressed_bytes :]
    parts.entries[0] = SeekEntry(len(first), len(raw), struct.unpack("<I", first[-4:])[0])


def zstd_without_size() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(write_content_size=False, write_checksum=True)


def two_frames_in_one(parts: ShardParts) -> None:
    first = parts.entries[0]
    more = compressed_zeros(1 << 20)
    stop = first.compressed_bytes
    parts.frames = parts.frames[:stop] + more + parts.frames[stop:]
    parts.entries[0] = SeekEntry(stop + len(more), *first[1:])


def large_ids(parts: ShardParts) -> None:
    import zstandard

    raw = b"\xff" * parts.entries[0].decompressed_bytes
    first = zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    parts.frames = first + parts.frames[parts.entries[0].compressed_bytes :]
    parts.entries[0] = SeekEntry(len(first), len(raw), struct.unpack("<I", first[-4:])[0])


SHARDS: dict[str, Callable[[ShardParts], object]] = {
    **{
        f"{key} {value!r:.20}": set_header(**{key: value})
        for key, values in {
            "tokens": [0, -1, 1 << 62, True, "7", None, 7.0, [7], 10**4000],
            "documents": [-1, 1 << 62, True, "7", 10**4000],
            "frame_tokens": [0, -64, 1 << 25, 1 << 62, True, "64"],
            "id_bytes": [0, 1, 3, 4, 8, -2, True, 1 << 62],
            "text_bytes": [-1, 1 << 63, "7"],
            "row_tokens": [0, -1, 64, 1 << 62, True, "64"],
            "version": [0, 2, True, "1", 10**4000],
            "direction": ["forward", 7, "x" * 30_000],
            "tokenizer_sha256": ["0" * 64, None],
            "dictionary_sha256": ["0" * 64, 7],
            "another": [1],
        }.items()
        for value in values
    },
    "no tokens": lambda parts: parts.header.pop("tokens"),
    "a header of a list": lambda parts: setattr(parts, "header_json", b"[]"),
    "a header of brackets": lambda parts: setattr(parts, "header_json", b"[" * 60_000),
    "a header of megabytes": lambda parts: setattr(parts, "header_json", b" " * (8 << 20)),
    "a header that is no text": lambda parts: setattr(parts, "header_json", b"\xff" * 50),
    "many documents": many_documents,
    "documents without tokens": empty_documents,
    "no counts": lambda parts: setattr(parts, "counts", b""),
    "more counts": lambda parts: setattr(parts, "counts", compressed_zeros(1 << 30)),
    "counts and a tail": lambda parts: setattr(parts, "counts", parts.counts + bytes(100_000)),
    "a giant frame": giant_frame,
    "a frame of unknown size": unknown_size,
    "two frames in one": two_frames_in_one,
    "ids past the vocabulary": large_ids,
    "four billion entries": lambda parts: setattr(parts, "seek_table", table((1 << 32) - 1)),
    "no entries": lambda parts: setattr(parts, "seek_table", table(0)),
    "entries past the end": lambda parts: parts.more_entries.append(
        SeekEntry((1 << 32) - 1, (1 << 32) - 1, 0)
    ),
    "frames of gigabytes": lambda parts: setattr(
        parts, "entries", [SeekEntry(*entry[:1], (1 << 32) - 2, 0) for entry in parts.entries]
    ),
    "nothing": lambda _: b"",
    "a table alone": lambda _: table(1, struct.pack("<III", 0, 0, 0)),
}


@pytest.mark.parametrize("hostile", SHARDS)
def test_a_hostile_shard_is_one_error(copy: Path, hostile: str) -> None:
    change_shard(copy, SHARDS[hostile])
    assert SHARD in refused(copy)
    manifest = Manifest.load(copy)
    store = FrameStore(DataSet.open(copy), "train")
    (first,) = (
        sum(-(-entry.tokens // manifest.frame_tokens) for entry in manifest.shards[:number])
        for number, entry in enumerate(manifest.shards)
        if entry.file == SHARD
    )
    with within_bounds(), suppress(ShardCorruptError):
        store.frame(first)


@pytest.mark.parametrize("num_entries", [1 << 20, (1 << 22) + 1, (1 << 22) + 2, (1 << 32) - 1])
def test_a_sparse_file_with_room_for_its_claims_is_refused_at_once(
    copy: Path, num_entries: int
) -> None:
    """A sparse file may have the size that it claims, at no cost."""
    footer = struct.pack("<IBI", num_entries, 0x80, 0x8F92EAB1)
    table_bytes = 8 + 12 * num_entries + 9
    start = 1000
    with (copy / SHARD).open("wb") as file:
        file.truncate(start)
        file.seek(start)
        file.write(struct.pack("<II", 0x184D2A5E, (table_bytes - 8) & 0xFFFFFFFF))
        file.truncate(start + table_bytes - 9)
        file.seek(0, os.SEEK_END)
        file.write(footer)
    agree(copy)
    assert SHARD in refused(copy)


def test_a_sparse_index_and_frame_of_gigabytes_are_not_read(copy: Path) -> None:
    parts = ShardParts.of((copy / SHARD).read_bytes())
    header = json.dumps(parts.header).encode()
    for frame_bytes, index_bytes, header_bytes in (
        (len(parts.frames), 3 << 30, 2 << 30),
        (len(parts.frames), 3 << 30, len(header)),
        (3 << 30, 8 + 12 + len(header) + len(parts.counts), len(header)),
    ):
        index = struct.pack("<II8sI", 0x184D2A5D, index_bytes - 8, b"MEGABACK", header_bytes)
        entries = [*parts.entries[:-1], SeekEntry(0, *parts.entries[-1][1:])]
        before = sum(entry.compressed_bytes for entry in entries)
        entries[-1] = SeekEntry(frame_bytes - before, *entries[-1][1:])
        packed = b"".join(struct.pack("<III", *entry) for entry in entries)
        tail = table(len(entries) + 1, packed + struct.pack("<III", index_bytes, 0, 0x51D8E999))
        with (copy / SHARD).open("wb") as file:
            file.truncate(frame_bytes)
            file.seek(frame_bytes)
            file.write(index + header + parts.counts)
            file.truncate(frame_bytes + index_bytes)
            file.seek(0, os.SEEK_END)
            file.write(tail)
        agree(copy)
        assert SHARD in refused(copy)


def test_a_document_too_long_to_show_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_MAX_DOCUMENT_TOKENS", 3)
    result = CliRunner().invoke(inspection.main, [str(copy), "--document", "0"])
    assert result.exit_code == 10
    assert "more than the 3 that can be shown" in result.stderr
