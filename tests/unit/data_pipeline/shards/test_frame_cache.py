"""Frame cache: never returns wrong frames, exceeds its size or stops reading."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.common.locks import locked
from data_pipeline.errors import SourceUnreadableError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.frame_cache import CachedShard, CacheSettings, FrameCache
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import ShardReader
from data_pipeline.storage import retries
from tests.helpers.batches import BEGIN, END, write_data_set
from tests.helpers.data_sets import frames_of, publish, stored_frames, with_flipped_bit
from tests.helpers.file_server import QUICK, FileServer, serving
from tests.helpers.forged import forged

SHARD = "5a" * 32
ORIGIN = "https://example.org/set"
KEY = FrameCache(CacheSettings(Path(), 0), ORIGIN).of_shard("a.zst", SHARD, 1).key
LARGEST = 400
"""Bytes of a frame in these tests."""


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of two shards and about ten frames."""
    generator = np.random.default_rng(7)
    shards = [
        [np.array([BEGIN, *generator.integers(3, 600, length), END]) for length in lengths]
        for lengths in ([300, 5, 44], [9, 240, 1])
    ]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_data_set(folder, shards).manifest.save(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> CacheSettings:
    return CacheSettings(tmp_path / "cache", 1 << 20)


def kept(folder: Path) -> list[Path]:
    """The files of frames in a cache, complete or partial."""
    return sorted(path for path in folder.glob("*/*") if path.is_file())


def kept_bytes(folder: Path) -> int:
    sizes = 0
    for path in kept(folder):
        with suppress(FileNotFoundError):  # another process has removed or renamed it
            sizes += path.stat().st_size
    return sizes


def shard(folder: Path, max_bytes: int) -> CachedShard:
    return FrameCache(CacheSettings(folder, max_bytes), ORIGIN).of_shard("a.zst", SHARD, 1)


def test_a_cached_frame_is_not_requested_again(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    url = publish(server, folder)
    frames_of(DataSet.open(url, cache))
    data_set = DataSet.open(url, cache)
    readers = [data_set.open_shard(entry) for entry in data_set.manifest.shards]
    server.requests.clear()
    for reader in readers:
        for frame in range(reader.num_frames):
            reader.frame(frame)
    assert server.requests == []


def test_a_frame_is_stored_under_a_hash_of_its_origin(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    url = publish(server, folder)
    data_set = DataSet.open(url, cache)
    entry = data_set.manifest.shards[0]
    data_set.open_shard(entry).frame(2)
    (path,) = kept(cache.folder)
    origin = json.dumps([url, "", {}])
    identity = json.dumps([origin, entry.file, entry.file_sha256, entry.file_bytes])
    assert path == cache.folder / hashlib.sha256(identity.encode()).hexdigest() / "2"


def test_cached_frames_are_read_without_the_server(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    data_set = DataSet.open(publish(server, folder), cache)
    reader = data_set.open_shard(data_set.manifest.shards[0])
    ids = reader.frame(1).tolist()
    server.faults.extend(["500"] * 20)
    assert reader.frame(1).tolist() == ids
    with pytest.raises(SourceUnreadableError):
        reader.frame(2)


DAMAGES = {
    "a flipped bit": lambda data: with_flipped_bit(data, len(data) // 2),
    "a flipped bit of its head": lambda data: with_flipped_bit(data, 5),
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: data[:0],
    "longer": lambda data: data + b"\0",
    "nonsense": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_replaced(
    server: FileServer,
    folder: Path,
    cache: CacheSettings,
    damage: Callable[[bytes], bytes],
) -> None:
    data_set = DataSet.open(publish(server, folder), cache)
    frames_of(data_set)
    intact = {path: path.read_bytes() for path in kept(cache.folder)}
    for path, data in intact.items():
        path.write_bytes(damage(data))
    assert frames_of(data_set) == stored_frames(folder)
    assert {path: path.read_bytes() for path in kept(cache.folder)} == intact


def test_frames_of_different_shards_are_separate(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    data_set = DataSet.open(publish(server, folder), cache)
    frames_of(data_set)
    one, other = sorted({path.parent for path in kept(cache.folder)})
    for path in one.iterdir():
        if (other / path.name).exists():
            shutil.copy(path, other / path.name)
    assert frames_of(data_set) == stored_frames(folder)


def test_a_data_set_that_claims_to_be_another_one_does_not_change_it(
    server: FileServer, tmp_path: Path, cache: CacheSettings
) -> None:
    # Untrusted: the same names, sizes and checksums of frames, and it claims the other's hashes.
    generator = np.random.default_rng(3)
    documents = [generator.integers(0, 1 << 16, 100)]
    others = [
        np.frombuffer(forged(ids.astype("<u2").tobytes(), generator.bytes(32)), dtype="<u2")
        for ids in np.split(documents[0], 5)
    ]
    sets = {}
    for name, one in (("good", documents), ("evil", [np.concatenate(others)])):
        (tmp_path / name).mkdir()
        sets[name] = write_data_set(tmp_path / name, [one], frame_tokens=20)
    (entry,), (lying,) = (data_set.manifest.shards for data_set in sets.values())
    lying = replace(lying, file_sha256=entry.file_sha256)
    assert (lying.file, lying.file_bytes) == (entry.file, entry.file_bytes)
    indices = set()
    for name in sets:
        with ShardReader(tmp_path / name / entry.file) as reader:
            stop = reader.frame_offsets[-1]
        indices.add((tmp_path / name / entry.file).read_bytes()[stop:])
    assert len(indices) == 1
    sets["good"].manifest.save(tmp_path / "good")
    replace(sets["evil"].manifest, shards=(lying,)).save(tmp_path / "evil")
    good, evil = (publish(server, tmp_path / name, name) for name in sets)
    for query in ("", "?id=1"):
        assert frames_of(DataSet.open(evil + query, cache)) == stored_frames(tmp_path / "evil")
        assert frames_of(DataSet.open(good + query, cache)) == stored_frames(tmp_path / "good")
    assert frames_of(DataSet.open(evil, cache)) != frames_of(DataSet.open(good, cache))


def test_a_renewed_signature_finds_cached_frames(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    url, entry = publish(server, folder), Manifest.load(folder).shards[0]
    for day in range(3):
        signed = f"{url}?X-Amz-Credential=me&X-Amz-Date={day}&X-Amz-Signature={day}"
        reader = DataSet.open(signed, cache).open_shard(entry)
        server.requests.clear()
        assert reader.frame(1).tolist() == stored_frames(folder)[entry.file][1]
        assert len(server.requests) == (day == 0)
    assert "X-Amz" not in str([path.read_bytes() for path in kept(cache.folder)])


def test_a_frame_received_damaged_is_not_cached(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    data_set = DataSet.open(publish(server, folder), cache)
    entry = data_set.manifest.shards[0]
    reader = data_set.open_shard(entry)
    name = f"shards/{entry.file}"
    intact = server.files[name]
    server.files[name] = with_flipped_bit(intact, 20)
    with pytest.raises(Exception, match="frame 0 at byte 0 does not decode"):
        reader.frame(0)
    assert kept(cache.folder) == []
    server.files[name] = intact
    assert reader.frame(0).tolist() == stored_frames(folder)[entry.file][0]


def test_files_that_vanish_are_fetched_again(
    server: FileServer, folder: Path, cache: CacheSettings
) -> None:
    data_set = DataSet.open(publish(server, folder), cache)
    frames_of(data_set)
    shutil.rmtree(cache.folder)
    assert frames_of(data_set) == stored_frames(folder)
    assert kept(cache.folder)


@settings(max_examples=60, deadline=None)
@given(
    max_bytes=st.integers(0, 2000),
    puts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, LARGEST)), max_size=60),
    strays=st.lists(st.integers(0, 900), max_size=4),
    is_counted=st.booleans(),
)
def test_the_cache_never_exceeds_its_size(
    tmp_path_factory: pytest.TempPathFactory,
    max_bytes: int,
    puts: list[tuple[int, int]],
    strays: list[int],
    is_counted: bool,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    (folder / KEY).mkdir()
    for number, size in enumerate(strays):  # of an earlier run, killed or with a larger cache
        (folder / KEY / f".{number}.{'abc' * 4}.partial").write_bytes(bytes(size))
    if not is_counted:
        (folder / ".bytes").write_bytes(b"")
    frames = shard(folder, max_bytes)
    is_in_use = False
    for frame, size in puts:
        data = bytes([frame]) * size
        frames.put(frame, data)
        if size <= max_bytes:
            is_in_use = True  # before that, leftovers stay
            assert frames.get(frame, size) == data
        assert not is_in_use or kept_bytes(folder) <= max_bytes


def test_the_least_recently_used_frame_is_removed_first(tmp_path: Path) -> None:
    frames = shard(tmp_path, max_bytes=1000)
    for frame in range(10):
        frames.put(frame, bytes(100))
        os.utime(tmp_path / KEY / str(frame), ns=(frame, frame))
    assert frames.get(0, 100) == bytes(100)
    frames.put(10, bytes(100))
    assert {int(path.name) for path in kept(tmp_path)} == {0, *range(3, 11)}


def test_a_frame_larger_than_the_cache_is_not_cached(tmp_path: Path) -> None:
    frames = shard(tmp_path, max_bytes=99)
    frames.put(0, bytes(100))
    assert frames.get(0, 100) is None
    assert kept(tmp_path) == []


def test_a_full_disk_is_logged_once_and_reading_continues(
    server: FileServer,
    folder: Path,
    cache: CacheSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data_set = DataSet.open(publish(server, folder), cache)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = stored_frames(folder)
    monkeypatch.setattr(os, "write", fail)
    with caplog.at_level(logging.WARNING):
        assert frames_of(data_set) == expected
    (record,) = caplog.records
    assert str(cache.folder) in record.getMessage()
    assert "No space left on device" in record.getMessage()


def test_a_folder_that_cannot_be_created_is_logged_once_and_reading_continues(
    server: FileServer, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    data_set = DataSet.open(publish(server, folder), CacheSettings(tmp_path / "file" / "c", 1000))
    with caplog.at_level(logging.WARNING):
        assert frames_of(data_set) == stored_frames(folder)
    assert len(caplog.records) == 1


def fill(folder: Path, max_bytes: int, seed: int) -> tuple[int, int]:
    """Use a shared cache. Returns the number of wrong frames, and its largest size."""
    generator = np.random.default_rng(seed)
    frames = shard(folder, max_bytes)
    wrong = largest = 0
    for frame in generator.integers(0, 200, 400).tolist():
        data = np.full(LARGEST, frame, dtype=np.uint8).tobytes()
        found = frames.get(frame, LARGEST)
        wrong += found not in (None, data)
        if found is None:
            frames.put(frame, data)
        with locked(folder / ".lock"):
            largest = max(largest, kept_bytes(folder))
    return wrong, largest


def test_processes_share_a_cache_and_its_bound(tmp_path: Path) -> None:
    max_bytes, processes = 20 * LARGEST, 4
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        tasks = [(tmp_path, max_bytes, seed) for seed in range(processes)]
        wrong, largest = zip(*pool.starmap(fill, tasks, chunksize=1), strict=True)
    assert sum(wrong) == 0
    # Each other process may be writing a frame that a scan did not see.
    assert max_bytes / 2 < max(largest) <= max_bytes + (processes - 1) * LARGEST
    assert [path for path in kept(tmp_path) if path.name.endswith(".partial")] == []
