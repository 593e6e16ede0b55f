"""Data sets in folders and at URLs: the same frames, and damage named in one error."""

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import (
    MegabackError,
    ShardCorruptError,
    ShardsMissingError,
    SourceMissingError,
    SourceUnreadableError,
    TokenizerError,
    TokenizerMismatchError,
)
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.frame_cache import CacheSettings
from data_pipeline.shards.manifest import DICTIONARY_NAME, MANIFEST_NAME, ShardEntry
from data_pipeline.shards.recompress import recompress
from data_pipeline.storage import retries
from data_pipeline.text.tokenizer import TOKENIZER_JSON_NAME, TOKENIZER_NAME
from tests.helpers.batches import BACKWARD_TOKENS, BEGIN, END, write_data_set
from tests.helpers.data_sets import (
    KINDS,
    Frames,
    Place,
    empty_memory,
    frames_of,
    stored_frames,
    with_flipped_bit,
)
from tests.helpers.file_server import QUICK, FileServer, serving

GENERATOR = np.random.default_rng(7)
SHARDS = [
    [np.array([BEGIN, *GENERATOR.integers(3, 600, length), END]) for length in lengths]
    for lengths in ([300, 5, 0, 120, 44], [9, 640, 1], [2])
]


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)


@pytest.fixture(scope="module")
def running() -> Iterator[FileServer]:
    with serving() as server, empty_memory():
        yield server


@pytest.fixture(scope="module")
def with_dictionary(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of a real build, recompressed with a dictionary; read-only."""
    out = tmp_path_factory.mktemp("recompressed") / "shards"
    recompress(finished, out, Compression(level=5), dictionary_bytes=1024, workers=1)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set of three shards, without a tokenizer."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_data_set(folder, SHARDS).manifest.save(folder)
    return folder


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, folder: Path, server: FileServer) -> Place:
    return Place(request.param, folder, server)


def first(data_set: DataSet) -> ShardEntry:
    return data_set.manifest.shards[0]


def message_of(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["finished", "with_dictionary"])
@pytest.mark.parametrize("is_cached", [False, True], ids=["no cache", "cache"])
def test_every_address_gives_the_frames_of_the_folder(
    kind: str,
    name: str,
    is_cached: bool,
    server: FileServer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "copy"))
    cache = CacheSettings(tmp_path / "cache", 1 << 30) if is_cached else None
    data_set = DataSet.open(Place(kind, folder, server).address, cache)
    expected = stored_frames(folder)
    assert frames_of(data_set) == expected
    assert frames_of(data_set) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_address_gives_the_manifest_and_the_codec_of_the_folder(
    kind: str, server: FileServer, copy: Path
) -> None:
    data_set, local = DataSet.open(Place(kind, copy, server).address), DataSet.open(copy)
    assert data_set.manifest == local.manifest
    assert data_set.codec().format == local.manifest.text_format


def read_randomly(data_set: DataSet, frames: Frames, threads: int, seed: int) -> list[bool]:
    """Whether each of many random frames, read by many threads at once, is right."""
    generator = random.Random(seed)
    readers = {entry.file: data_set.open_shard(entry) for entry in data_set.manifest.shards}
    places = [(file, frame) for file, of_shard in frames.items() for frame in range(len(of_shard))]
    chosen = generator.choices(places, k=300)

    def is_right(place: tuple[str, int]) -> bool:
        file, frame = place
        return bool(readers[file].frame(frame).tolist() == frames[file][frame])

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(is_right, chosen))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["finished", "with_dictionary"])
def test_eight_threads_read_the_stored_frames(
    kind: str, name: str, server: FileServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "copy"))
    cache = CacheSettings(tmp_path / "cache", 20_000)
    data_set = DataSet.open(Place(kind, folder, server).address, cache)
    assert all(read_randomly(data_set, stored_frames(folder), 8, seed=3))


def test_a_folder_without_a_manifest_is_refused(place: Place) -> None:
    place.remove(MANIFEST_NAME)
    with pytest.raises(ShardsMissingError, match="with `megaback shards build") as caught:
        DataSet.open(place.address)
    assert place.address.removeprefix("file://") in message_of(caught.value)


def test_a_damaged_manifest_is_named(place: Place) -> None:
    place.write(MANIFEST_NAME, place.read(MANIFEST_NAME)[:-200])
    with pytest.raises(ShardCorruptError, match=r"manifest\.json is not a manifest") as caught:
        DataSet.open(place.address)
    message_of(caught.value)


def test_a_manifest_of_other_contents_is_named(place: Place) -> None:
    place.change(MANIFEST_NAME, fingerprint="5" * 64)
    with pytest.raises(ShardCorruptError, match="its fingerprint is not that of its entries"):
        DataSet.open(place.address)


def test_a_missing_shard_is_named(place: Place) -> None:
    data_set = DataSet.open(place.address)
    file = first(data_set).file
    place.remove(file)
    with pytest.raises(ShardCorruptError, match=f"cannot read the shard .*{file}") as caught:
        data_set.open_shard(first(data_set))
    message_of(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_shard_is_named(place: Place, fraction: float) -> None:
    data_set = DataSet.open(place.address)
    file = first(data_set).file
    data = place.read(file)
    place.write(file, data[: int(len(data) * fraction)])
    with pytest.raises(ShardCorruptError, match=file) as caught:
        data_set.open_shard(first(data_set))
    message_of(caught.value)


@pytest.mark.parametrize(("mine", "other"), [(0, 1), (1, 0), (0, 2), (2, 0)])
def test_a_shard_in_place_of_another_is_named(place: Place, mine: int, other: int) -> None:
    data_set = DataSet.open(place.address)
    entries = data_set.manifest.shards
    place.write(entries[mine].file, place.read(entries[other].file))
    with pytest.raises(ShardCorruptError, match="is not the one in the manifest") as caught:
        data_set.open_shard(entries[mine])
    message = message_of(caught.value)
    assert f"{entries[other].file_bytes} bytes instead of {entries[mine].file_bytes}" in message


def test_a_data_set_that_was_replaced_after_it_was_opened_is_named(
    place: Place, tmp_path: Path
) -> None:
    data_set = DataSet.open(place.address)
    other = tmp_path / "other"
    other.mkdir()
    write_data_set(other, SHARDS[::-1]).manifest.save(other)
    for path in other.iterdir():
        place.write(path.name, path.read_bytes())
    with pytest.raises(ShardCorruptError, match="is not the one in the manifest"):
        data_set.open_shard(first(data_set))


def test_a_flipped_bit_is_named_by_file_frame_and_offset(place: Place) -> None:
    data_set = DataSet.open(place.address)
    entry = first(data_set)
    reader = data_set.open_shard(entry)
    offset = int(reader.frame_offsets[3])
    place.write(entry.file, with_flipped_bit(place.read(entry.file), offset + 20))
    with pytest.raises(ShardCorruptError, match=f"frame 3 at byte {offset} does not") as caught:
        reader.frame(3)
    assert entry.file in message_of(caught.value)
    assert len(reader.frame(2)) == data_set.manifest.frame_tokens


def test_a_shard_truncated_while_open_is_named_by_frame_and_offset(
    place: Place,
) -> None:
    data_set = DataSet.open(place.address)
    entry = first(data_set)
    reader = data_set.open_shard(entry)
    offset = int(reader.frame_offsets[3])
    place.write(entry.file, place.read(entry.file)[: offset + 10])
    with pytest.raises(ShardCorruptError, match=f"frame 3 at byte {offset} cannot") as caught:
        reader.frame(3)
    assert entry.file in message_of(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_dictionary_is_named(
    kind: str, server: FileServer, with_dictionary: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_dictionary, tmp_path / "copy"))
    place = Place(kind, folder, server)
    place.remove(DICTIONARY_NAME)
    data_set = DataSet.open(place.address)
    with pytest.raises(ShardCorruptError, match=f"zstd dictionary .*{DICTIONARY_NAME}, which its"):
        data_set.open_shard(first(data_set))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_is_missing_or_damaged_is_named(
    kind: str, server: FileServer, copy: Path
) -> None:
    place = Place(kind, copy, server)
    data_set = DataSet.open(place.address)
    damaged = place.read(TOKENIZER_NAME)[:-1000]
    place.remove(TOKENIZER_NAME)
    with pytest.raises(TokenizerError, match=f"cannot read the tokenizer .*{TOKENIZER_NAME}"):
        data_set.codec()
    place.write(TOKENIZER_NAME, damaged)
    with pytest.raises((TokenizerError, TokenizerMismatchError), match=TOKENIZER_NAME) as caught:
        data_set.codec()
    message_of(caught.value)


def test_a_tokenizer_of_the_other_name_is_found_where_missing_files_are_forbidden(
    server: FileServer, copy: Path
) -> None:
    """A server such as S3, without permission to list."""
    place = Place("http", copy, server)
    data_set = DataSet.open(place.address)
    content = place.read(TOKENIZER_NAME)
    place.remove(TOKENIZER_NAME)
    server.faults.append("403")
    with pytest.raises(SourceUnreadableError, match=f"{TOKENIZER_NAME}: .*permission"):
        data_set.codec()
    place.write(TOKENIZER_JSON_NAME, content)
    server.faults.append("403")
    assert data_set.codec().model_bytes == content


@pytest.mark.parametrize("address", ["nonsense://bucket/a", "memory://", "http://[nonsense/a"])
def test_a_malformed_address_is_one_error(address: str) -> None:
    with pytest.raises(MegabackError) as caught:
        DataSet.open(address)
    message_of(caught.value)


def test_an_unknown_protocol_is_missing_rather_than_empty() -> None:
    with pytest.raises(SourceMissingError):
        DataSet.open("nonsense://bucket/shards")


def test_local_folders_are_not_cached(folder: Path, tmp_path: Path) -> None:
    frames_of(DataSet.open(folder, CacheSettings(tmp_path / "cache", 1 << 20)))
    assert not (tmp_path / "cache").exists()


def test_ids_of_a_frame_have_the_type_of_the_text_format(folder: Path) -> None:
    data_set = DataSet.open(folder)
    assert data_set.manifest.text_format == BACKWARD_TOKENS
    assert data_set.open_shard(first(data_set)).frame(0).dtype == np.dtype("<u2")
