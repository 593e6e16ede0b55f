"""Frame store shared by threads: right frames, few decodes, and errors of bad frames."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.errors import ShardCorruptError, SourceUnreadableError
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.shards.data_set import DataSet as OpenDataSet
from data_pipeline.shards.reader import ShardReader
from data_pipeline.storage import retries
from tests.helpers.batches import DataSet, whole_frames, write_data_set
from tests.helpers.data_sets import publish
from tests.helpers.file_server import QUICK, FileServer, serving

Damage = Callable[[Path], None]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    """Three shards of ten frames."""
    data = write_data_set(tmp_path, whole_frames(30))
    data.manifest.save(tmp_path)
    return data


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shard and frame of everything that is decoded from now on."""
    found: list[str] = []
    decode = ShardReader.frame

    def noting(reader: ShardReader, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        found.append(f"{Path(reader.shown).name} {frame}")
        return decode(reader, frame)

    monkeypatch.setattr(ShardReader, "frame", noting)
    return found


@pytest.fixture
def decoding_waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Event that decoding waits for."""
    may_decode = threading.Event()
    decode = ShardReader.frame

    def waiting(reader: ShardReader, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        may_decode.wait(10)
        return decode(reader, frame)

    monkeypatch.setattr(ShardReader, "frame", waiting)
    return may_decode


def ask_on_threads(store: FrameStore, data: DataSet, num_threads: int = 8) -> list[int]:
    """Read all frames on threads, in different orders. Returns the numbers of the wrong ones."""

    def ask(seed: int) -> list[int]:
        numbers = np.random.default_rng(seed).permutation(store.num_frames).tolist()
        return [
            number
            for number in numbers
            if store.frame(number).tolist() != data.frames[number].tolist()
        ]

    with ThreadPoolExecutor(num_threads) as executor:
        return [number for wrong in executor.map(ask, range(num_threads)) for number in wrong]


@pytest.mark.parametrize("keep_frames", [1, 5, 64])
def test_threads_that_share_a_store_get_the_right_frames(data: DataSet, keep_frames: int) -> None:
    assert ask_on_threads(data.store(keep_frames), data) == []


@pytest.mark.parametrize("keep_frames", [1, 3, 64])
def test_rows_of_more_frames_than_are_kept_are_in_the_requested_order(
    data: DataSet, keep_frames: int
) -> None:
    store = data.store(keep_frames)
    frame = np.random.default_rng(1).integers(30, size=50)
    row = np.random.default_rng(2).integers(4, size=50)
    with ThreadPoolExecutor(4) as executor:
        asked = [executor.submit(store.rows, frame, row, 16) for _ in range(4)]
        found = [tokens_NC.tolist() for tokens_NC, _, _ in (one.result() for one in asked)]
    places = zip(frame.tolist(), row.tolist(), strict=True)
    expected = [data.frames[of][16 * at : 16 * at + 16].tolist() for of, at in places]
    assert found == [expected] * 4


def test_kept_frames_stay_when_the_capacity_grows(data: DataSet, decoded: list[str]) -> None:
    store = data.store(keep_frames=3)
    for number in range(3):
        store.frame(number)
    store.keep(10)
    decoded.clear()
    assert [store.frame(number).tolist() for number in range(3)] == [
        data.frames[number].tolist() for number in range(3)
    ]
    assert decoded == []


def test_requests_that_all_fail_leave_room_for_other_frames(data: DataSet) -> None:
    data.damage(14)
    data.damage(15)
    store = data.store(keep_frames=2)
    with ThreadPoolExecutor(1) as executor:
        store.request([14, 15], executor)
    assert store.frame(3).tolist() == data.frames[3].tolist()


def test_threads_and_requests_together_give_the_right_frames(data: DataSet) -> None:
    store = data.store(keep_frames=7)
    with ThreadPoolExecutor(3) as executor:
        for _ in range(3):
            store.request(range(30), executor)
            assert ask_on_threads(store, data) == []


def test_a_frame_is_decoded_at_most_once_per_thread(data: DataSet, decoded: list[str]) -> None:
    ask_on_threads(data.store(), data, num_threads=8)
    assert max(Counter(decoded).values()) <= 8


def test_a_frame_that_is_kept_is_not_decoded_again(data: DataSet, decoded: list[str]) -> None:
    store = data.store()
    ask_on_threads(store, data)
    decoded.clear()
    ask_on_threads(store, data)
    assert decoded == []


def test_requested_frames_are_decoded_ahead(data: DataSet, decoded: list[str]) -> None:
    store = data.store()
    with ThreadPoolExecutor(2) as executor:
        store.request([3, 17, 4], executor)
    assert sorted(decoded) == [
        "train-00000-00000.zst 3",
        "train-00000-00000.zst 4",
        "train-00001-00000.zst 7",
    ]


def test_a_requested_frame_is_decoded_once(data: DataSet, decoded: list[str]) -> None:
    store = data.store()
    with ThreadPoolExecutor(2) as executor:
        store.request([3, 3], executor)
        store.request([3], executor)
        store.frame(3)
    assert len(decoded) == 1


def test_a_frame_that_is_kept_is_not_requested_again(data: DataSet, decoded: list[str]) -> None:
    store = data.store()
    store.frame(3)
    with ThreadPoolExecutor(1) as executor:
        store.request([3], executor)
    assert len(decoded) == 1


def test_a_request_does_not_wait(data: DataSet, decoding_waits: threading.Event) -> None:
    store = data.store()
    with ThreadPoolExecutor(2) as executor:
        start_s = time.perf_counter()
        store.request(range(30), executor)
        took_s = time.perf_counter() - start_s
        decoding_waits.set()
    assert took_s < 5


def test_a_canceled_request_blocks_no_reader(
    data: DataSet, decoding_waits: threading.Event
) -> None:
    store = data.store()
    executor = ThreadPoolExecutor(1)
    store.request(range(30), executor)
    executor.shutdown(wait=False, cancel_futures=True)
    decoding_waits.set()
    assert ask_on_threads(store, data) == []


def test_the_frame_that_came_first_is_dropped_first(data: DataSet, decoded: list[str]) -> None:
    store = data.store(keep_frames=3)
    for number in (0, 1, 2, 0, 3):  # 0 is used again, but stays the oldest
        store.frame(number)
    decoded.clear()
    for number in (1, 2, 3, 0):
        store.frame(number)
    assert decoded == ["train-00000-00000.zst 0"]


def test_at_most_the_given_number_of_frames_is_kept(data: DataSet, decoded: list[str]) -> None:
    store = data.store(keep_frames=3)
    store.keep(10)
    store.keep(5)
    for number in range(10):
        store.frame(number)
    decoded.clear()
    for number in range(10):
        store.frame(number)
    assert decoded == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace(path: Path) -> None:
    path.write_bytes((path.parent / "train-00000-00000.zst").read_bytes() + b"more")


def empty(path: Path) -> None:
    path.write_bytes(b"")


BAD_SHARDS = pytest.mark.parametrize("damage", [truncate, replace, empty, Path.unlink])


@BAD_SHARDS
def test_a_missing_or_replaced_shard_is_named(data: DataSet, damage: Damage) -> None:
    path = data.folder / data.manifest.shards[1].file
    damage(path)
    with pytest.raises(ShardCorruptError, match=path.name):
        data.store().frame(15)


@BAD_SHARDS
def test_the_other_shards_can_be_read_beside_a_bad_one(data: DataSet, damage: Damage) -> None:
    damage(data.folder / data.manifest.shards[1].file)
    store = data.store()
    for number in [*range(10), *range(20, 30)]:
        assert store.frame(number).tolist() == data.frames[number].tolist()


@BAD_SHARDS
def test_every_frame_of_a_bad_shard_can_be_skipped_and_is_counted(
    data: DataSet, damage: Damage
) -> None:
    damage(data.folder / data.manifest.shards[1].file)
    store = data.store(skip_bad_frames=True)
    assert [len(store.frame(number)) for number in range(30)] == [64] * 10 + [0] * 10 + [64] * 10
    assert store.skipped_frames == 10


def test_a_flipped_bit_is_named_by_file_frame_and_byte(data: DataSet) -> None:
    path = data.folder / data.manifest.shards[1].file
    with ShardReader(path) as reader:
        offset = int(reader.frame_offsets[5])
    data.damage(15)
    with pytest.raises(ShardCorruptError, match=rf"{path.name}.* frame 5 at byte {offset} "):
        data.store().frame(15)


def test_a_flipped_bit_costs_one_frame(data: DataSet) -> None:
    data.damage(15)
    store = data.store(skip_bad_frames=True)
    lengths = [len(store.frame(number)) for number in range(30)]
    assert [number for number, length in enumerate(lengths) if length != 64] == [15]


@pytest.mark.parametrize("flipped_bit", range(0, 8, 3))
def test_no_bit_of_a_frame_can_be_flipped_undetected(data: DataSet, flipped_bit: int) -> None:
    path = data.folder / data.manifest.shards[0].file
    stored = path.read_bytes()
    with ShardReader(path) as reader:
        stop = int(reader.frame_offsets[1])
    unnoticed = []
    for at in range(stop):
        path.write_bytes(stored[:at] + bytes([stored[at] ^ 1 << flipped_bit]) + stored[at + 1 :])
        try:
            ids = data.store().frame(0)
        except ShardCorruptError:
            continue
        if ids.tolist() != data.frames[0].tolist():
            unnoticed.append(at)
    assert unnoticed == []


def test_the_error_of_a_requested_frame_is_raised_when_it_is_read(data: DataSet) -> None:
    path = data.damage(15)
    store = data.store()
    with ThreadPoolExecutor(2) as executor:
        store.request([14, 15, 16], executor)
    assert [len(store.frame(number)) for number in (14, 16)] == [64, 64]
    with pytest.raises(ShardCorruptError, match=path.name):
        store.frame(15)


@pytest.mark.parametrize("is_requested", [False, True])
def test_a_frame_that_was_restored_is_read_again(data: DataSet, is_requested: bool) -> None:
    path = data.folder / data.manifest.shards[1].file
    stored = path.read_bytes()
    data.damage(15)
    store = data.store()
    if is_requested:
        with ThreadPoolExecutor(1) as executor:
            store.request([15], executor)
    with pytest.raises(ShardCorruptError):
        store.frame(15)
    with path.open("r+b") as file:
        file.write(stored)
    assert store.frame(15).tolist() == data.frames[15].tolist()


def test_a_frame_skipped_repeatedly_is_counted_and_logged_once(
    data: DataSet, caplog: pytest.LogCaptureFixture
) -> None:
    path = data.damage(15)
    store = data.store(keep_frames=1, skip_bad_frames=True)
    with caplog.at_level(logging.WARNING):
        ask_on_threads(store, DataSet(data.folder, data.manifest, excluded(data, 15)))
    assert store.skipped_frames == 1
    assert [path.name in record.getMessage() for record in caplog.records] == [True]


def excluded(data: DataSet, frame: int) -> list[npt.NDArray[np.int64]]:
    return [ids[:0] if number == frame else ids for number, ids in enumerate(data.frames)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(retries, "POLICY", QUICK)
    with serving() as running:
        yield running


def test_a_slow_and_unreliable_server_changes_no_frame(server: FileServer, data: DataSet) -> None:
    store = FrameStore(OpenDataSet.open(publish(server, data.folder)), "train")
    server.faults.extend(["503", "", "cut", "", "stall", "", "reset", "", "", "500"])
    assert ask_on_threads(store, data, num_threads=2) == []


def test_a_frame_on_a_dead_server_is_named_by_its_shard(server: FileServer, data: DataSet) -> None:
    store = FrameStore(OpenDataSet.open(publish(server, data.folder)), "train")
    store.frame(10)
    server.faults.extend(["reset"] * 20)
    with pytest.raises(SourceUnreadableError, match=data.manifest.shards[1].file):
        store.frame(11)


def test_a_recovered_server_is_used_again(server: FileServer, data: DataSet) -> None:
    store = FrameStore(OpenDataSet.open(publish(server, data.folder)), "train")
    server.faults.extend(["500"] * QUICK.max_attempts)
    with ThreadPoolExecutor(1) as executor:
        store.request([11], executor)
        with pytest.raises(SourceUnreadableError):
            store.frame(11)
    assert store.frame(11).tolist() == data.frames[11].tolist()


def test_a_shard_that_is_replaced_on_the_server_is_named(server: FileServer, data: DataSet) -> None:
    store = FrameStore(OpenDataSet.open(publish(server, data.folder)), "train")
    store.frame(10)
    file = data.manifest.shards[1].file
    server.versions[f"shards/{file}"] = "2"
    with pytest.raises(ShardCorruptError, match=rf"{file}.*replaced"):
        store.frame(11)


def test_frames_of_a_dead_server_can_be_skipped_and_are_counted(
    server: FileServer, data: DataSet
) -> None:
    data_set = OpenDataSet.open(publish(server, data.folder))
    store = FrameStore(data_set, "train", skip_bad_frames=True)
    server.faults.extend(["500"] * QUICK.max_attempts)
    assert [len(store.frame(number)) for number in (10, 11)] == [0, 64]
    assert store.skipped_frames == 1
