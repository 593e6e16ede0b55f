"""File systems that list folders, with fsspec's memory file system, and invalid addresses."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import (
    BackendError,
    MegabackError,
    OutputExistsError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources import parquet as parquet_source
from data_pipeline.sources.registry import Columns, list_slices, read_slice, require_outside
from data_pipeline.storage import retries
from tests.helpers.file_server import QUICK, documents, write_files

COLUMNS = Columns("text", "language", "language_score")


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file per format, read-only."""
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("nonsense://bucket/a.txt", SourceMissingError),
        ("memory://", SourceMissingError),
        ("memory://nowhere/*.txt", SourceMissingError),
        ("memory://nowhere/a.txt", SourceMissingError),
        ("zip://a.txt::memory://a.zip", SourceMissingError),
        ("file://", SourceMissingError),
        ("file:///nowhere/a.txt", SourceMissingError),
    ],
)
def test_an_address_without_files_is_missing(source: str, error: type[MegabackError]) -> None:
    with pytest.raises(error) as caught:
        list_slices(source)
    assert "\n" not in str(caught.value)


def test_a_missing_package_of_a_file_system_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", fail)
    with pytest.raises(BackendError, match="s3fs"):
        list_slices("s3://bucket/a.txt")


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The files in a file system that lists folders."""
    import fsspec

    file_system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        file_system.pipe(f"/set/data/{path.name}", path.read_bytes())
    file_system.pipe("/set/README.md", b"what this is")
    file_system.pipe("/set/.git/b.jsonl", b"hidden")
    yield "memory://set"
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


def test_a_remote_folder_has_the_documents_of_the_local_folder(
    memory: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "SLICE_BYTES", 1)
    assert documents(memory, COLUMNS) == documents(str(folder), COLUMNS)
    pieces = [(piece.start, piece.stop, piece.size_bytes) for piece in list_slices(memory)]
    assert pieces == [(p.start, p.stop, p.size_bytes) for p in list_slices(str(folder))]


def test_a_remote_pattern_lists_matching_files(memory: str) -> None:
    names = [piece.path for piece in list_slices(f"{memory}/data/*.jsonl*")]
    assert [name.rpartition("/")[2] for name in names] == ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]


def test_a_changed_file_of_a_file_system_without_versions_is_refused(memory: str) -> None:
    import fsspec

    (piece,) = list_slices(f"{memory}/data/a.txt")
    fsspec.filesystem("memory").pipe("/set/data/a.txt", b"another text")
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_change_during_reading_is_refused_at_the_end(memory: str, name: str) -> None:
    import fsspec

    file_system = fsspec.filesystem("memory")
    reader = read_slice(list_slices(f"{memory}/data/{name}")[0])
    next(reader)
    data = file_system.cat(f"/set/data/{name}")
    file_system.pipe(f"/set/data/{name}", data[:-9] + bytes(9))
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(reader)


def test_an_output_within_the_folder_of_a_file_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="is within the source"):
        require_outside(f"file://{tmp_path}", tmp_path / "out")
    require_outside("memory://out", tmp_path / "out")


def test_a_file_url_is_a_local_path(folder: Path) -> None:
    assert list_slices(f"file://{folder}") == list_slices(str(folder))
    assert list_slices(f"file://{folder}/*.gz") == list_slices(str(folder / "*.gz"))


def test_a_short_read_of_a_driver_is_retried(
    memory: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    file_system = type(fsspec.filesystem("memory"))
    cat_file, calls = file_system.cat_file, iter(range(1000))

    def short(self: object, path: str, start: int, end: int) -> bytes:
        data: bytes = cat_file(self, path, start=start, end=end)
        return data[:-1] if next(calls) % 2 == 0 else data

    monkeypatch.setattr(file_system, "cat_file", short)
    assert documents(f"{memory}/data/a.jsonl.gz") == documents(str(folder / "a.jsonl.gz"))


def test_many_remote_files_are_listed_in_order(memory: str) -> None:
    import fsspec

    file_system = fsspec.filesystem("memory")
    for number in range(100):
        file_system.pipe(f"/many/{number:03}.txt", f"text {number}".encode())
    names = [piece.path.rpartition("/")[2] for piece in list_slices("memory://many")]
    assert names == [f"{number:03}.txt" for number in range(100)]


def test_remote_files_are_listed_by_many_threads(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    file_system = fsspec.filesystem("memory")
    for number in range(8):
        file_system.pipe(f"/many/{number}.txt", b"text")
    together = threading.Barrier(8, timeout=5)
    cat_file = type(file_system).cat_file

    def wait_for_the_others(*arguments: object, **options: object) -> bytes:
        together.wait()
        data: bytes = cat_file(*arguments, **options)
        return data

    monkeypatch.setattr(type(file_system), "cat_file", wait_for_the_others)
    assert len(list_slices("memory://many")) == 8
