"""Shard index, and readers shared by threads: concurrent decoding, and closing."""

import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ShardCorruptError
from data_pipeline.shards.index import ShardHeader
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter

IDENTITY = {"direction": "backward", "unit": "token", "tokenizer_sha256": "5" * 64}


def write_shard(path: Path, num_tokens: int, frame_tokens: int) -> np.ndarray:
    """Write a shard of one document. Returns its ids."""
    ids = np.random.default_rng(1).integers(0, 600, num_tokens).astype("<u2")
    with path.open("wb") as file:
        writer = ShardWriter(file, IDENTITY, ids.dtype, frame_tokens)
        writer.add(ids, text_bytes=num_tokens)
        writer.finish()
    return ids


def test_many_threads_decode_large_frames_at_once(tmp_path: Path) -> None:
    frame_tokens, num_frames = 65_536, 6
    ids = write_shard(tmp_path / "shard.zst", num_frames * frame_tokens, frame_tokens)
    reader = ShardReader(tmp_path / "shard.zst")
    chosen = random.Random(1).choices(range(num_frames), k=300)

    def is_right(frame: int) -> bool:
        expected = ids[frame * frame_tokens : (frame + 1) * frame_tokens]
        return bool(np.array_equal(reader.frame(frame), expected))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(is_right, chosen))


def open_descriptors(path: Path) -> int:
    links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    return links.count(path.resolve())


def test_a_reader_that_is_dropped_or_fails_to_open_leaves_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "shard.zst"
    write_shard(path, 200, 64)
    reader = ShardReader(path)
    assert open_descriptors(path) == 1
    del reader
    assert open_descriptors(path) == 0
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardCorruptError):
        ShardReader(path)
    assert open_descriptors(path) == 0


@pytest.mark.parametrize("entry", [0, 1, 2, 3])
def test_a_seek_table_of_other_sizes_than_the_header_is_refused(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "shard.zst"
    write_shard(path, 200, 64)
    data = bytearray(path.read_bytes())
    size_at = len(data) - 9 - 12 * 5 + 12 * entry + 4
    (size,) = struct.unpack_from("<I", data, size_at)
    struct.pack_into("<I", data, size_at, size + 2)
    path.write_bytes(data)
    with pytest.raises(ShardCorruptError, match="disagree on the number of tokens"):
        ShardReader(path)


def header_json(tokens: str) -> bytes:
    """A header from before dictionaries."""
    return (
        '{"version": 1, "direction": "backward", "unit": "token", "tokenizer_sha256": "5", '
        f'"id_bytes": 2, "frame_tokens": 64, "tokens": {tokens}, "documents": 1, "text_bytes": 1}}'
    ).encode()


@pytest.mark.parametrize("tokens", ['"7"', "7.0", "null", "[7]", "1e999"])
def test_a_header_with_a_field_of_another_type_is_refused(tokens: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        ShardHeader.from_json(header_json(tokens))


def test_a_header_without_a_dictionary_field_needs_no_dictionary() -> None:
    assert ShardHeader.from_json(header_json("7")).dictionary_sha256 is None
