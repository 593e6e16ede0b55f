"""Shard files: round trips, reading by other tools, and detection of damage.

Of a damaged file, a reader either raises ShardCorruptError, or returns the ids and documents that
were written. Other fields of its header (direction, tokenizer, bytes of text) are covered by the
file's hash in the manifest, see test_verify.py.
"""

import hashlib
import io
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ShardCorruptError
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardDigest, ShardWriter

Documents = list[npt.NDArray[np.unsignedinteger]]

IDENTITY = {"direction": "backward", "unit": "token", "tokenizer_sha256": "5" * 64}


@st.composite
def shards(draw: st.DrawFn) -> tuple[Documents, int]:
    """Documents of ids of one width, and tokens per frame."""
    dtype = np.dtype(draw(st.sampled_from(["<u2", "<u4"])))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(2, 300), min_size=1, max_size=12))
    largest = draw(st.sampled_from([3, 600, 2 ** (8 * dtype.itemsize)]))
    documents = [generator.integers(0, largest, length, dtype) for length in lengths]
    return documents, draw(st.sampled_from([64, 128, 1024]))


def train_dictionary(seed: int) -> bytes:
    """A dictionary for ids of two bytes below 600."""
    generator = np.random.default_rng(seed)
    phrases = generator.integers(0, 600, (40, 12), np.dtype("<u2"))
    samples = [phrases[generator.integers(0, 40, 30)].tobytes() for _ in range(60)]
    return zstandard.train_dictionary(2048, samples).as_bytes()


PLAIN = Compression()
DICTIONARY = train_dictionary(1)
COMPRESSIONS = {
    "level 1": Compression(level=1),
    "level 19": Compression(level=19),
    "long distance": Compression(long_distance=True),
    "dictionary": Compression(level=9, dictionary=DICTIONARY),
}


def write_shard(
    documents: Documents, frame_tokens: int, compression: Compression = PLAIN
) -> tuple[bytes, ShardDigest]:
    file = io.BytesIO()
    writer = ShardWriter(file, IDENTITY, documents[0].dtype, frame_tokens, compression)
    for document in documents:
        writer.add(document, text_bytes=3 * len(document))
    digest = writer.finish()
    return file.getvalue(), digest


def some_documents(seed: int, lengths: list[int], largest: int = 600) -> Documents:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, largest, length, np.dtype("<u2")) for length in lengths]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every test of this module may overwrite."""
    return tmp_path_factory.mktemp("shard") / "train-00000-00000.zst"


@pytest.fixture(scope="module")
def small_shard() -> bytes:
    """A shard of four frames, the last one short; small enough to try every bit."""
    return write_shard(some_documents(1, [50, 90, 2, 75]), frame_tokens=64)[0]


def read_everything(
    path: Path, dictionary: bytes | None = None
) -> tuple[list[int], list[int], str]:
    """Ids, tokens of each document, and hash of both as in a digest."""
    with ShardReader(path, dictionary) as reader:
        ids = reader.tokens(0, reader.header.tokens)
        document_tokens = reader.document_tokens()
    content = ids.tobytes() + document_tokens.astype("<u4").tobytes()
    return ids.tolist(), document_tokens.tolist(), hashlib.sha256(content).hexdigest()


def outcome(path: Path, damaged: bytes, dictionary: bytes | None = None) -> object:
    """Result of reading a damaged shard: everything, or the error."""
    path.touch()
    with path.open("r+b") as file:  # in place: some file systems flush a file that is rewritten
        file.write(damaged)
        file.truncate()
    try:
        return read_everything(path, dictionary)
    except Exception as error:  # noqa: BLE001 - tests look for unexpected errors
        return error


def bit_flips(data: bytes, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    for bit in range(8 * start, 8 * stop):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


def harmful_flips(
    path: Path, data: bytes, intact: object, stop: int, dictionary: bytes | None = None
) -> list[str]:
    """Flips before byte `stop` that change the result without an error."""
    harmful = []
    for bit, flipped in bit_flips(data, 0, stop):
        found = outcome(path, flipped, dictionary)
        if not isinstance(found, ShardCorruptError) and found != intact:
            around = flipped[max(bit // 8 - 16, 0) : bit // 8 + 4]
            harmful.append(f"bit {bit % 8} of byte {bit // 8}, {around!r}: {found!r:.80}")
    return harmful


@given(shard=shards())
def test_ids_and_documents_are_read_back(path: Path, shard: tuple[Documents, int]) -> None:
    documents, frame_tokens = shard
    data, digest = write_shard(documents, frame_tokens)
    path.write_bytes(data)
    ids = np.concatenate(documents).tolist()
    assert read_everything(path) == (ids, list(map(len, documents)), digest.content_sha256)


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
@settings(max_examples=25)
@given(shard=shards())
def test_any_compression_gives_the_same_ids_and_documents(
    path: Path, compression: Compression, shard: tuple[Documents, int]
) -> None:
    documents, frame_tokens = shard
    data, digest = write_shard(documents, frame_tokens, compression)
    path.write_bytes(data)
    _, plain = write_shard(documents, frame_tokens)
    assert digest.content_sha256 == plain.content_sha256
    assert read_everything(path, compression.dictionary) == (
        np.concatenate(documents).tolist(),
        list(map(len, documents)),
        digest.content_sha256,
    )


@given(shard=shards())
def test_documents_are_iterated_in_stored_order(path: Path, shard: tuple[Documents, int]) -> None:
    documents, frame_tokens = shard
    path.write_bytes(write_shard(documents, frame_tokens)[0])
    with ShardReader(path) as reader:
        found = [ids.tolist() for ids in reader.documents()]
    assert found == [document.tolist() for document in documents]


@settings(max_examples=25)
@given(shard=shards(), frame_tokens=st.sampled_from([64, 256]))
def test_a_shard_can_be_copied(path: Path, shard: tuple[Documents, int], frame_tokens: int) -> None:
    documents, _ = shard
    path.write_bytes(write_shard(documents, 128)[0])
    file = io.BytesIO()
    writer = ShardWriter(file, IDENTITY, documents[0].dtype, frame_tokens)
    with ShardReader(path) as reader:
        writer.add_shard(reader)
    digest = writer.finish()
    assert (file.getvalue(), digest) == write_shard(documents, frame_tokens)


@given(shard=shards())
def test_a_digest_describes_the_file(shard: tuple[Documents, int]) -> None:
    documents, frame_tokens = shard
    data, digest = write_shard(documents, frame_tokens)
    counts = np.array(list(map(len, documents)), dtype="<u4")
    tokens = int(counts.sum())
    assert digest == ShardDigest(
        tokens=tokens,
        documents=len(documents),
        text_bytes=3 * tokens,
        file_bytes=len(data),
        file_sha256=hashlib.sha256(data).hexdigest(),
        content_sha256=hashlib.sha256(
            np.concatenate(documents).tobytes() + counts.tobytes()
        ).hexdigest(),
    )


@given(shard=shards(), data=st.data())
def test_any_range_of_tokens_can_be_read(
    path: Path, shard: tuple[Documents, int], data: st.DataObject
) -> None:
    documents, frame_tokens = shard
    path.write_bytes(write_shard(documents, frame_tokens)[0])
    ids = np.concatenate(documents)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    reader = ShardReader(path)
    assert reader.tokens(start, stop).tolist() == ids[start:stop].tolist()
    reader.close()


@given(shard=shards())
def test_every_frame_but_the_last_is_full(path: Path, shard: tuple[Documents, int]) -> None:
    documents, frame_tokens = shard
    path.write_bytes(write_shard(documents, frame_tokens)[0])
    reader = ShardReader(path)
    lengths = [len(reader.frame(frame)) for frame in range(reader.num_frames)]
    reader.close()
    tokens = sum(map(len, documents))
    full, rest = divmod(tokens, frame_tokens)
    assert lengths == [frame_tokens] * full + [rest] * (rest > 0)


@given(shard=shards())
def test_writing_a_shard_is_deterministic(shard: tuple[Documents, int]) -> None:
    assert write_shard(*shard) == write_shard(*shard)


@settings(max_examples=20)
@given(shard=shards())
def test_a_plain_zstd_decoder_gives_the_raw_ids(shard: tuple[Documents, int]) -> None:
    documents, frame_tokens = shard
    data = write_shard(documents, frame_tokens)[0]
    if shutil.which("zstd"):
        raw = subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
    else:
        reader = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True)
        raw = reader.readall()
    assert raw == np.concatenate(documents).tobytes()


@given(shard=shards())
def test_the_seek_table_is_that_of_the_seekable_format(shard: tuple[Documents, int]) -> None:
    """Parsed by facebook/zstd, contrib/seekable_format/zstd_seekable_compression_format.md."""
    documents, frame_tokens = shard
    data = write_shard(documents, frame_tokens)[0]
    num_frames, descriptor, magic = struct.unpack("<IBI", data[-9:])
    assert (magic, descriptor) == (0x8F92EAB1, 0b1000_0000)
    table_start = len(data) - 9 - 12 * num_frames
    assert struct.unpack("<II", data[table_start - 8 : table_start]) == (
        0x184D2A5E,
        len(data) - table_start,
    )
    offset, raw = 0, b""
    for compressed_bytes, decompressed_bytes, checksum in struct.iter_unpack(
        "<III", data[table_start:-9]
    ):
        frame = data[offset : offset + compressed_bytes]
        offset += compressed_bytes
        if decompressed_bytes == 0:  # the index, a skippable frame, is an entry without content
            assert struct.unpack("<II", frame[:8]) == (0x184D2A5D, len(frame) - 8)
            assert checksum == 0x51D8E999  # XXH64 of nothing
            continue
        content = zstandard.ZstdDecompressor().decompress(frame)
        assert len(content) == decompressed_bytes
        assert frame[-4:] == struct.pack("<I", checksum)
        assert zstandard.get_frame_parameters(frame).has_checksum
        raw += content
    assert (offset, raw) == (table_start - 8, np.concatenate(documents).tobytes())


def test_a_shard_truncated_anywhere_is_detected(path: Path, small_shard: bytes) -> None:
    unnoticed = [
        size
        for size in range(len(small_shard))
        if not isinstance(outcome(path, small_shard[:size]), ShardCorruptError)
    ]
    assert unnoticed == []


def test_bytes_after_the_end_are_detected(path: Path, small_shard: bytes) -> None:
    assert isinstance(outcome(path, small_shard + b"\0"), ShardCorruptError)


def test_a_flipped_bit_is_detected_or_harmless(path: Path, small_shard: bytes) -> None:
    path.write_bytes(small_shard)
    intact = read_everything(path)
    assert harmful_flips(path, small_shard, intact, len(small_shard)) == []


def test_a_flipped_bit_in_the_header_of_a_full_size_frame_is_detected_or_harmless(
    path: Path,
) -> None:
    data = write_shard(some_documents(2, [70_000]), frame_tokens=65_536)[0]
    path.write_bytes(data)
    intact = read_everything(path)
    assert harmful_flips(path, data, intact, 16) == []


def test_a_flipped_bit_in_a_frames_content_is_detected(path: Path) -> None:
    data = write_shard(some_documents(3, [200], largest=65_536), frame_tokens=256)[0]
    frame_bytes = struct.unpack("<I", data[-9 - 24 : -9 - 20])[0]
    unnoticed = [
        bit
        for bit, flipped in bit_flips(data, 12, frame_bytes)
        if not isinstance(outcome(path, flipped), ShardCorruptError)
    ]
    assert unnoticed == []


def test_a_broken_frame_is_named_by_file_number_and_offset(path: Path, small_shard: bytes) -> None:
    path.write_bytes(small_shard)
    (first_frame_bytes,) = struct.unpack("<I", small_shard[-9 - 5 * 12 :][:4])
    middle = first_frame_bytes + 20
    damaged = small_shard[:middle] + b"\xff\xff\xff\xff" + small_shard[middle + 4 :]
    message = str(outcome(path, damaged))
    assert str(path) in message
    assert f"frame 1 at byte {first_frame_bytes}" in message


def test_a_frame_without_a_checksum_is_refused(path: Path, small_shard: bytes) -> None:
    path.write_bytes(small_shard)
    with ShardReader(path) as intact:
        ids = intact.frame(0)
        checksum = small_shard[: intact.frame_offsets[1]][-4:]
    compressor = zstandard.ZstdCompressor(write_checksum=False)
    noise = np.random.default_rng(0).bytes(ids.nbytes - 4)
    forged = compressor.compress(noise + checksum)  # stored uncompressed

    class Keeper:
        def get(self, frame: int, num_bytes: int) -> bytes:  # noqa: ARG002
            return forged

        def put(self, frame: int, data: bytes) -> None:  # noqa: ARG002
            assert data == small_shard[: len(data)]

        def remove(self, frame: int) -> None:
            assert frame == 0

    assert forged.endswith(checksum)
    with ShardReader(path, cache=Keeper()) as reader:
        assert reader.frame(0).tolist() == ids.tolist()


@pytest.mark.parametrize("content", [b"", b"x", bytes(100)], ids=["no bytes", "a byte", "zeros"])
def test_a_file_that_is_not_a_shard_is_named(path: Path, content: bytes) -> None:
    found = outcome(path, content)
    assert isinstance(found, ShardCorruptError)
    assert str(path) in str(found)


def test_a_shard_of_another_version_is_refused(path: Path, small_shard: bytes) -> None:
    assert small_shard.count(b'"version": 1') == 1
    damaged = small_shard.replace(b'"version": 1', b'"version": 2')
    assert isinstance(outcome(path, damaged), ShardCorruptError)


def test_frames_and_header_name_the_dictionary_that_they_need(path: Path) -> None:
    documents = some_documents(4, [300, 20])
    path.write_bytes(write_shard(documents, 64, Compression(dictionary=DICTIONARY))[0])
    needed = zstandard.ZstdCompressionDict(DICTIONARY).dict_id()
    assert needed != 0
    assert zstandard.get_frame_parameters(path.read_bytes()).dict_id == needed
    with ShardReader(path, DICTIONARY) as reader:
        assert reader.header.dictionary_sha256 == hashlib.sha256(DICTIONARY).hexdigest()


@pytest.mark.parametrize("given_dictionary", [None, train_dictionary(2)], ids=["none", "another"])
def test_the_error_for_a_missing_dictionary_names_it(
    path: Path, given_dictionary: bytes | None
) -> None:
    documents = some_documents(4, [300, 20])
    path.write_bytes(write_shard(documents, 64, Compression(dictionary=DICTIONARY))[0])
    needed = hashlib.sha256(DICTIONARY).hexdigest()[:12]
    with pytest.raises(ShardCorruptError, match=f"zstd dictionary {needed}"):
        ShardReader(path, given_dictionary)


def test_the_document_index_can_be_read_without_the_dictionary(path: Path) -> None:
    documents = some_documents(4, [300, 20])
    data, _ = write_shard(documents, 64, Compression(dictionary=DICTIONARY))
    compressed_counts = data[data.rindex(struct.pack("<I", zstandard.MAGIC_NUMBER)) :]
    counts = zstandard.ZstdDecompressor().decompressobj().decompress(compressed_counts)
    assert np.frombuffer(counts, dtype="<u4").tolist() == [300, 20]


def test_a_flipped_bit_in_a_frame_with_a_dictionary_is_detected_or_harmless(
    path: Path,
) -> None:
    documents = some_documents(1, [50, 90, 2, 75])
    data, _ = write_shard(documents, 64, Compression(dictionary=DICTIONARY))
    path.write_bytes(data)
    intact = read_everything(path, DICTIONARY)
    assert harmful_flips(path, data, intact, len(data), DICTIONARY) == []
