"""Data sets over HTTP: few requests, retries, and one error when they are exhausted."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import (
    ShardCorruptError,
    SourceUnreadableError,
)
from data_pipeline.shards import index as shard_index
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.storage import remote_ranges, retries
from data_pipeline.storage.address_variables import expanded
from data_pipeline.storage.remote_folder import RemoteFolder
from tests.helpers.batches import BEGIN, END, write_data_set
from tests.helpers.data_sets import (
    Place,
    frames_of,
    publish,
    stored_frames,
)
from tests.helpers.file_server import QUICK, FileServer

GENERATOR = np.random.default_rng(7)
SHARDS = [
    [np.array([BEGIN, *GENERATOR.integers(3, 600, length), END]) for length in lengths]
    for lengths in ([300, 5, 0, 120, 44], [9, 640, 1], [2])
]


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data set of three shards, without a tokenizer."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_data_set(folder, SHARDS).manifest.save(folder)
    return folder


def first(data_set: DataSet) -> ShardEntry:
    return data_set.manifest.shards[0]


def message_of(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


@settings(max_examples=20, deadline=None)
@given(
    groups=st.lists(
        st.lists(
            st.sampled_from(["500", "503", "429", "cut", "reset"]), max_size=QUICK.max_attempts - 1
        ),
        max_size=12,
    )
)
def test_faults_below_the_limit_never_change_a_frame(
    running: FileServer, tmp_path_factory: pytest.TempPathFactory, groups: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write_data_set(folder, SHARDS).manifest.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "POLICY", QUICK)
        url = publish(running, folder)
        running.faults.clear()
        running.faults.extend(fault for group in groups for fault in [*group, ""])
        assert frames_of(DataSet.open(url)) == stored_frames(folder)


def test_a_stalled_request_is_retried(server: FileServer, folder: Path) -> None:
    data_set = DataSet.open(publish(server, folder))
    server.faults.extend(["stall", "", "stall"])
    assert frames_of(data_set) == stored_frames(folder)


def test_opening_a_shard_and_reading_a_frame_take_one_request_each(
    server: FileServer, folder: Path
) -> None:
    data_set = DataSet.open(publish(server, folder))
    server.requests.clear()
    reader = data_set.open_shard(first(data_set))
    assert len(server.requests) == 1
    reader.frame(2)
    reader.frame(0)
    assert len(server.requests) == 3


@pytest.mark.parametrize(("documents", "requests"), [(9_000, 1), (90_000, 2)])
def test_a_large_document_index_takes_at_most_one_more_request(
    server: FileServer, tmp_path: Path, documents: int, requests: int
) -> None:
    lengths = GENERATOR.integers(2, 40, documents)
    ids = [np.ones(length, dtype=np.int64) for length in lengths]
    write_data_set(tmp_path, [ids], frame_tokens=1 << 16).manifest.save(tmp_path)
    data_set = DataSet.open(publish(server, tmp_path))
    server.requests.clear()
    reader = data_set.open_shard(first(data_set))
    assert len(server.requests) == requests
    assert reader.document_tokens().tolist() == lengths.tolist()


def test_a_large_seek_table_takes_no_more_requests(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_index, "_TAIL_BYTES", 1)
    monkeypatch.setattr(remote_ranges, "_TAIL_BYTES", 1)
    data_set = DataSet.open(publish(server, folder))
    server.requests.clear()
    data_set.open_shard(first(data_set))
    assert len(server.requests) == 2


def test_a_dead_server_is_one_error(server: FileServer, folder: Path) -> None:
    data_set = DataSet.open(publish(server, folder))
    reader = data_set.open_shard(first(data_set))
    server.faults.extend(["reset"] * 20)
    with pytest.raises(SourceUnreadableError, match="gave up after 4 attempts") as caught:
        reader.frame(1)
    assert first(data_set).file in message_of(caught.value)
    assert caught.value.exit_code == SourceUnreadableError.exit_code


def test_a_server_error_for_a_manifest_is_not_reported_as_missing(
    server: FileServer, folder: Path
) -> None:
    url = publish(server, folder)
    server.faults.extend(["500"] * 20)
    with pytest.raises(SourceUnreadableError, match=r"manifest\.json: the server returned 500"):
        DataSet.open(url)


def test_a_shard_removed_while_open_is_named_by_frame_over_a_network(
    server: FileServer, folder: Path
) -> None:
    place = Place("http", folder, server)
    data_set = DataSet.open(place.address)
    reader = data_set.open_shard(first(data_set))
    place.remove(first(data_set).file)
    with pytest.raises(ShardCorruptError, match=r"frame 0 at byte 0 cannot be read \(the server"):
        reader.frame(0)


def test_a_shard_replaced_on_the_server_while_open_is_detected(
    server: FileServer, folder: Path
) -> None:
    data_set = DataSet.open(publish(server, folder))
    entry = first(data_set)
    reader = data_set.open_shard(entry)
    server.versions[f"shards/{entry.file}"] = "2"
    with pytest.raises(ShardCorruptError, match=r"frame 1 at byte .*was replaced since") as caught:
        reader.frame(1)
    message_of(caught.value)


@pytest.mark.parametrize("address", ["http://host/shards", "http://host/shards/"])
def test_files_keep_the_query_of_their_folder(address: str) -> None:
    folder = RemoteFolder(f"{address}?signature=a/b")
    whole = "http://host/shards/manifest.json?signature=a/b"
    assert expanded(folder.url("manifest.json")) == whole
    assert folder.shown == "http://host/shards"


def test_signatures_and_passwords_are_used_and_not_shown(server: FileServer, folder: Path) -> None:
    url = publish(server, folder).replace("http://", "http://me:word@") + "/?signature=secret"
    data_set = DataSet.open(url)
    assert data_set.name == server.url("shards")
    assert frames_of(data_set) == stored_frames(folder)
    del server.files[f"shards/{first(data_set).file}"]
    with pytest.raises(ShardCorruptError) as caught:
        data_set.open_shard(first(data_set))
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)


def frames_after_a_fork(url: str) -> list[list[int]]:
    data_set = DataSet.open(url)
    expected = frames_of(data_set)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(frames_of(data_set)))
    process.start()
    assert receiver.poll(20)
    found = receiver.recv()
    process.join()
    assert found == expected
    return found


def test_a_forked_process_can_read_an_open_data_set(server: FileServer, folder: Path) -> None:
    url = publish(server, folder)
    spawned = multiprocessing.get_context("spawn")  # this process has threads of other tests
    with ProcessPoolExecutor(1, spawned) as pool:
        assert pool.submit(frames_after_a_fork, url).result() == stored_frames(folder)
