"""Shards that more than one file of tests reads: those of a real build, and a small data set."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from batch_helpers import DataSet, some_shards, write_data_set
from build_helpers import (
    EMPTY_DOCUMENTS,
    HARD_TEXTS,
    Codecs,
    hashes,
    make_settings,
    write_source,
)
from remote_helpers import FileServer, serving

from data_pipeline import plan, pool
from data_pipeline.build import build_shards


@pytest.fixture(scope="session")
def source_texts(english_documents: list[str]) -> list[str]:
    """Documents of which some are hard, some empty, and 50 come twice."""
    empty = [""] * EMPTY_DOCUMENTS
    return [*english_documents[:250], *HARD_TEXTS, *empty, *english_documents[200:250]]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Path:
    """A source of six files, not to be written to."""
    return write_source(tmp_path_factory.mktemp("build") / "source", source_texts)


@pytest.fixture
def a_task_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files would all be one task."""
    monkeypatch.setattr(plan, "_SMALLEST_TASK_BYTES", 1)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on processes, which take a second to start."""

    def threads(workers: int, **_options: object) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", threads)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, source: Path, codec: Codecs
) -> Iterator[Path]:
    """The folder of an uninterrupted build, not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SMALLEST_TASK_BYTES", 1)
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    before = hashes(out)
    yield out
    assert hashes(out) == before


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "shards"))


@pytest.fixture
def small(tmp_path: Path) -> DataSet:
    return write_data_set(tmp_path, some_shards())


@pytest.fixture(scope="module")
def running() -> Iterator[FileServer]:
    """A file server for the tests of a module."""
    with serving() as server:
        yield server


@pytest.fixture
def server(running: FileServer) -> FileServer:
    """The module's server, without files, faults or memories of requests."""
    running.forget()
    return running
