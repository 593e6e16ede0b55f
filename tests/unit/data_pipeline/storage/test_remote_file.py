"""Sources over HTTP from a faulty server, compared with local files."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import (
    MegabackError,
    SourceEmptyError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources import decompression
from data_pipeline.sources import parquet as parquet_source
from data_pipeline.sources.registry import Columns, Slice, list_slices, read_slice
from data_pipeline.storage import remote_file, retries
from data_pipeline.storage.remote_file import RemoteFile
from tests.helpers.file_server import QUICK, TEXTS, FileServer, documents, serving, write_files

COLUMNS = Columns("text", "language", "language_score")
FAULTS = ["500", "503", "429", "cut", "reset"]
NAMES = ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl", "a.txt"]


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks: many requests per file, and documents before the last request."""
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(decompression, "PIECE_BYTES", 100)
    monkeypatch.setattr(parquet_source, "_BATCH_ROWS", 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file per format, read-only."""
    return write_files(tmp_path_factory.mktemp("files"))


def put(server: FileServer, path: Path) -> str:
    server.files[path.name] = path.read_bytes()
    return server.url(path.name)


def columns_of(name: str) -> Columns:
    return Columns() if name.endswith(".txt") else COLUMNS


@pytest.mark.parametrize("name", NAMES)
def test_a_file_over_http_has_the_documents_of_the_local_file(
    server: FileServer, folder: Path, small_blocks: None, name: str
) -> None:
    url = put(server, folder / name)
    assert documents(url, columns_of(name)) == documents(str(folder / name), columns_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_documents_survive_transient_faults_of_the_server(
    server: FileServer, folder: Path, small_blocks: None, name: str
) -> None:
    url = put(server, folder / name)
    server.faults.extend(["500", "429", "", "cut", "reset", "", "503", "cut", "429"])
    assert documents(url, columns_of(name)) == documents(str(folder / name), columns_of(name))
    assert not server.faults


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.lists(st.sampled_from(FAULTS), max_size=QUICK.max_attempts - 1), max_size=9),
    block_bytes=st.integers(1, 900),
    size_bytes=st.integers(0, 2500),
)
def test_faults_below_the_limit_do_not_change_the_bytes(
    groups: list[list[str]], block_bytes: int, size_bytes: int
) -> None:
    data = bytes(number * 7 % 251 for number in range(size_bytes))
    with pytest.MonkeyPatch.context() as patch, serving() as server:
        patch.setattr(retries, "POLICY", QUICK)
        patch.setattr(remote_file, "BLOCK_BYTES", max(block_bytes, size_bytes // 8 + 1))
        server.files["data"] = data
        server.faults.extend(fault for group in groups for fault in [*group, ""])
        file = RemoteFile(server.url("data"))
        assert file.buffered().read() == data


@settings(max_examples=30, deadline=None)
@given(
    reads=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 700)), max_size=8),
    block_bytes=st.integers(50, 900),
)
def test_a_remote_file_seeks_and_reads_as_a_local_one(
    running: FileServer, reads: list[tuple[int, int]], block_bytes: int
) -> None:
    data = bytes(number % 251 for number in range(1000))
    running.files["data"] = data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_file, "BLOCK_BYTES", block_bytes)
        file = RemoteFile(running.url("data"))
        for start, size in reads:
            assert file.seek(start) == start
            assert file.read(size) == data[start : start + size]
            assert file.tell() == start + len(data[start : start + size])


def test_a_stalled_request_is_retried(server: FileServer, folder: Path) -> None:
    url = put(server, folder / "a.jsonl")
    server.faults.extend(["stall", "", "stall"])
    assert documents(url) == documents(str(folder / "a.jsonl"))


def test_each_retry_is_logged_in_one_line(
    server: FileServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = put(server, folder / "a.txt")
    server.faults.extend(["503", "stall"])
    with caplog.at_level(logging.WARNING):
        documents(url)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"{url}: the server returned 503 Service Unavailable; retrying in")
    assert first.endswith("(attempt 1 of 4 failed)")
    assert "\n" not in second
    assert "(attempt 2 of 4 failed)" in second


def test_the_last_failure_reports_cause_and_attempts(server: FileServer, folder: Path) -> None:
    url = put(server, folder / "a.jsonl")
    (piece,) = list_slices(url)
    server.faults.extend(["500"] * 20)
    with pytest.raises(SourceUnreadableError) as caught:
        list(read_slice(piece))
    message = str(caught.value)
    assert message.startswith(f"{url}: the server returned 500 Internal Server Error; ")
    assert "gave up after 4 attempts in 0 s" in message
    assert len(server.faults) == 16
    assert "\n" not in message


def test_the_last_failure_within_a_parquet_file_is_reported(
    server: FileServer, folder: Path, small_blocks: None
) -> None:
    (piece,) = list_slices(put(server, folder / "a.parquet"))
    reader = read_slice(piece)
    next(reader)
    server.faults.extend(["reset"] * 20)
    with pytest.raises(SourceUnreadableError, match=r"a\.parquet: .*gave up after 4 attempts"):
        list(reader)


def test_no_attempt_begins_after_the_maximum_time(
    server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(server, folder / "a.txt")
    server.faults.extend(["500"] * 20)
    policy = retries.RetryPolicy(max_attempts=20, first_wait_s=0.01, max_total_s=0)
    monkeypatch.setattr(retries, "POLICY", policy)
    with pytest.raises(SourceUnreadableError, match="gave up after 1 attempts"):
        list_slices(url)


@pytest.mark.parametrize(
    ("status", "error"), [("403", SourceUnreadableError), ("404", SourceMissingError)]
)
def test_a_refusal_is_not_retried(
    server: FileServer, folder: Path, status: str, error: type[MegabackError]
) -> None:
    url = put(server, folder / "a.txt")
    server.faults.append(status)
    with pytest.raises(error, match=f"the server returned {status}"):
        list_slices(url)
    assert len(server.requests) == 1


def test_a_file_deleted_from_its_server_is_unreadable(server: FileServer, folder: Path) -> None:
    (piece,) = list_slices(put(server, folder / "a.txt"))
    server.files.clear()
    with pytest.raises(SourceUnreadableError, match=r"a\.txt: the server returned 404"):
        list(read_slice(piece))


def test_a_file_that_changed_on_its_server_since_listing_is_refused(
    server: FileServer, folder: Path
) -> None:
    (piece,) = list_slices(put(server, folder / "a.parquet"))
    server.versions["a.parquet"] = "2"
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    server: FileServer, folder: Path, small_blocks: None, name: str
) -> None:
    reader = read_slice(list_slices(put(server, folder / name))[0])
    next(reader)
    server.versions[name] = "2"
    with pytest.raises(SourceUnreadableError, match="changed while it was read"):
        list(reader)


def test_without_a_version_a_change_is_detected_by_the_stamp(
    server: FileServer, folder: Path
) -> None:
    server.gives_versions = False
    (piece,) = list_slices(put(server, folder / "a.jsonl"))
    assert [document.text for document in read_slice(piece)] == TEXTS
    server.files["a.jsonl"] = server.files["a.jsonl"].replace(b"document 59", b"document 95")
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


@pytest.mark.parametrize("name", NAMES)
def test_a_server_without_range_requests_is_refused(
    server: FileServer, folder: Path, name: str
) -> None:
    server.gives_ranges = False
    with pytest.raises(SourceUnreadableError, match="does not support range requests"):
        list_slices(put(server, folder / name))


def test_a_server_that_stops_supporting_ranges_is_refused(server: FileServer, folder: Path) -> None:
    reader = read_slice(list_slices(put(server, folder / "a.parquet"))[0])
    server.gives_ranges = False
    with pytest.raises(SourceUnreadableError, match="does not support range requests"):
        list(reader)


@pytest.mark.parametrize("gives_ranges", [True, False])
def test_an_empty_file_over_http_is_empty(server: FileServer, gives_ranges: bool) -> None:
    server.files["a.txt"] = b""
    server.gives_ranges = gives_ranges
    with pytest.raises(SourceEmptyError):
        list_slices(server.url("a.txt"))


def test_signatures_and_passwords_are_used_but_not_shown(server: FileServer, folder: Path) -> None:
    put(server, folder / "a.jsonl")
    url = server.url("a.jsonl?signature=secret").replace("http://", "http://me:word@")
    assert [document.text for document in documents(url)] == TEXTS
    with pytest.raises(MegabackError) as caught:
        list_slices(url.replace("a.jsonl", "b.jsonl"))
    assert "secret" not in str(caught.value)
    assert "word" not in str(caught.value)


def test_an_invalid_address_is_reported() -> None:
    with pytest.raises(MegabackError) as caught:
        list_slices("http://[nonsense/a.txt")
    assert "\n" not in str(caught.value)
    assert "nonsense" in str(caught.value)


def texts_of(piece: Slice) -> list[str]:
    return [document.text for document in read_slice(piece)]


def texts_before_and_after_a_fork(url: str) -> list[list[str]]:
    (piece,) = list_slices(url)
    before = texts_of(piece)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return [before, pool.apply_async(texts_of, [piece]).get(timeout=20)]


def test_a_process_forked_after_listing_can_read(server: FileServer, folder: Path) -> None:
    url = put(server, folder / "a.parquet")
    spawned = multiprocessing.get_context("spawn")  # other tests left threads in this process
    with ProcessPoolExecutor(1, spawned) as pool:
        assert pool.submit(texts_before_and_after_a_fork, url).result() == [TEXTS, TEXTS]


def test_a_refused_connection_is_retried() -> None:
    with serving() as server:
        url = server.url("a.txt")
    with pytest.raises(SourceUnreadableError, match="gave up after 4 attempts"):
        list_slices(url)


def test_a_folder_over_http_is_refused(server: FileServer) -> None:
    with pytest.raises(SourceMissingError, match="no file has a supported suffix"):
        list_slices(server.url("folder/"))
