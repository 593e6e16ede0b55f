"""Streaming decompression: bounded pieces and windows, and decompression bombs."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.sources import decompression
from data_pipeline.sources.decompression import CORRUPT_ERRORS, PIECE_BYTES, decompressed
from data_pipeline.sources.documents import Columns
from data_pipeline.sources.jsonl import Record, read_records
from data_pipeline.sources.registry import list_slices, read_slice

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
}
JOINED = [suffix for suffix in COMPRESS if suffix != ".lzma"]
"""Formats whose files may be concatenated."""


def pieces(data: bytes, suffix: str) -> list[bytes]:
    return list(decompressed(io.BytesIO(data), suffix, "a file"))


@cache
def _some_zeros(suffix: str) -> bytes:
    return COMPRESS[suffix](bytes(32 << 20))


def zeros(suffix: str, mebibytes: int) -> bytes:
    """A compressed file of zeros, made quickly from parts of 32 MiB."""
    return _some_zeros(suffix) * (mebibytes // 32)


@pytest.mark.parametrize("suffix", JOINED)
def test_pieces_are_bounded_for_any_expansion(suffix: str) -> None:
    stream = io.BytesIO(zeros(suffix, 64))
    lengths = [len(piece) for piece in decompressed(stream, suffix, "a file")]
    assert max(lengths) <= PIECE_BYTES
    assert sum(lengths) == 64 << 20


MEASURE = """
import json, sys, time
from pathlib import Path
from data_pipeline.errors import MegabackError
from data_pipeline.sources.registry import list_slices, read_slice
import pyarrow.parquet

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0])

before = peak()
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        for piece in list_slices(path):
            for document in read_slice(piece):
                pass
        print("read")
    except MegabackError as error:
        print(f"{type(error).__name__}: {error}")
    print(time.process_time() - start, (peak() - before) >> 10)
"""


def test_bombs_are_refused_with_bounded_time_and_memory(tmp_path: Path) -> None:
    for suffix in JOINED:
        (tmp_path / f"line.jsonl{suffix}").write_bytes(zeros(suffix, 3072))
        (tmp_path / f"text.txt{suffix}").write_bytes(zeros(suffix, 3072))
    files = sorted(map(str, tmp_path.iterdir()))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=True
    )
    found = result.stdout.splitlines()
    assert len(found) == 2 * len(files)
    for name, output, measured in zip(files, found[::2], found[1::2], strict=True):
        seconds, mebibytes = map(float, measured.split())
        assert output.startswith(f"BadRecordError: {name}")
        assert "longer than `max_record_bytes` 33554432" in output
        assert seconds < 5
        assert mebibytes < 200


@pytest.mark.parametrize("suffix", JOINED)
def test_a_long_line_is_skipped_and_later_ones_are_read(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(
        compress(b'{"text": "one"}\n') + zeros(suffix, 64) + compress(b'\n{"text": "three"}\n')
    )
    bad: list[BadRecordError] = []
    (piece,) = list_slices(str(path))
    documents = list(read_slice(piece, Columns(), bad.append))
    assert [document.position for document in documents] == [f"{path.name}:1", f"{path.name}:3"]
    assert [(error.cause, error.place) for error in bad] == [
        ("too long", f"{path}:2: longer than `max_record_bytes` 33554432 allows")
    ]
    records = list(read_records(str(path), 1024))
    assert [type(record) for record in records] == [Record, BadRecordError, Record]


@pytest.mark.parametrize("suffix", JOINED)
def test_a_decompression_bomb_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompression, "_MIN_EXPANDED_BYTES", 1 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(zeros(suffix, 64))
    (piece,) = list_slices(str(path))
    with pytest.raises(SourceUnreadableError, match=r"more than 1,000 times its size.*decompress"):
        list(read_slice(piece, Columns(), lambda _: None))


def zst_frame(window_log: int) -> bytes:
    """One record in a raw block of a frame with this window size."""
    content = b'{"text": "one"}'
    block = (1 | len(content) << 3).to_bytes(3, "little") + content
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


def xz_file(dictionary_bytes: int) -> bytes:
    """One record in the older format of xz, whose header has the dictionary size."""
    data = bytearray(lzma.compress(b'{"text": "one"}', lzma.FORMAT_ALONE))
    data[1:5] = dictionary_bytes.to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("a.jsonl.zst", zst_frame(27), zst_frame(31)),
        ("a.jsonl.xz", xz_file(1 << 27), xz_file((1 << 32) - 1)),
    ],
)
def test_a_header_with_a_large_window_is_refused_unless_allowed(
    tmp_path: Path, name: str, small: bytes, large: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(small)
    (piece,) = list_slices(str(path))
    assert [document.text for document in read_slice(piece)] == ["one"]
    path.write_bytes(large)
    (piece,) = list_slices(str(path))
    with pytest.raises(SourceUnreadableError, match=r"needs a .*window.* `max_record_bytes`"):
        list(read_slice(piece))
    with pytest.raises(SourceUnreadableError, match=r"needs a .*window.* `max_record_bytes`"):
        list(read_records(str(path)))
    if name.endswith(".zst"):
        documents = read_slice(piece, max_record_bytes=1 << 31)
        assert [document.text for document in documents] == ["one"]


@given(st.sampled_from(JOINED), st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_concatenated_files_are_read_as_one(suffix: str, parts: list[bytes]) -> None:
    data = b"".join(map(COMPRESS[suffix], parts))
    assert b"".join(pieces(data, suffix)) == b"".join(parts)


@given(st.sampled_from([*COMPRESS]), st.binary(max_size=2000), st.integers(0, 1 << 20), st.data())
def test_truncated_and_altered_files_are_detected(
    suffix: str, content: bytes, at: int, data: st.DataObject
) -> None:
    whole = COMPRESS[suffix](content)
    with pytest.raises(CORRUPT_ERRORS):
        pieces(whole[: 1 + at % (len(whole) - 1)], suffix)
    altered = bytearray(whole)
    altered[at % len(whole)] ^= data.draw(st.integers(1, 255))
    try:
        pieces(bytes(altered), suffix)
    except (*CORRUPT_ERRORS, SourceUnreadableError):
        pass


@given(st.binary(max_size=200), st.integers(1, 20))
def test_zstd_frames_are_read_across_pieces_of_any_size(content: bytes, size: int) -> None:
    skippable = b"\x52\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"other"
    compressor = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False)
    frame = compressor.compressobj()
    parts = [frame.compress(content), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    data = skippable + b"".join([*parts, frame.compress(content), frame.flush()]) + skippable
    cut = [data[start : start + size] for start in range(0, len(data), size)]
    read = decompression._decompress_zst(cut, 1 << 27)
    assert b"".join(read) == content * 2
