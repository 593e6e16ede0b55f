"""Document index: made once, whole or not at all, and never trusted when it is damaged."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ShardCorruptError, StorageError
from data_pipeline.loading import document_index
from data_pipeline.loading.best_fit import Group
from data_pipeline.loading.document_index import DocumentIndex, open_document_index
from data_pipeline.shards.data_set import DataSet
from tests.helpers.batches import data_set, some_shards


@pytest.fixture
def shards() -> Iterator[DataSet]:
    with data_set(some_shards()) as data:
        yield data.opened


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "megaback" / "document-rows"


def groups_of(index: DocumentIndex) -> list[list[list[int]]]:
    groups = (index.group(number) for number in range(index.num_frames))
    return [[group.lengths.tolist(), group.rows.tolist()] for group in groups]


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.index")
    return path


def test_an_index_is_made_once_by_one_of_several_threads_and_then_read(
    shards: DataSet, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "megaback.data")
    with ThreadPoolExecutor(4) as pool:
        indexes = list(pool.map(lambda _: open_document_index(shards, "train", 16), range(4)))
    assert len({str(groups_of(index)) for index in indexes}) == 1
    assert caplog.text.count("packing the documents") == 1
    assert {path.suffix for path in folder.iterdir()} == {".index", ".lock"}
    data = file_of(folder).read_bytes()

    file_of(folder).unlink()
    open_document_index(shards, "train", 16)
    assert file_of(folder).read_bytes() == data


def test_an_interrupted_index_leaves_no_file_and_is_made_by_the_next_start(
    shards: DataSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[Group]:
        yield Group(np.array([5]), np.array([0]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(document_index, "_even_groups", lambda *_: (1, interrupted()))
        with pytest.raises(KeyboardInterrupt):
            open_document_index(shards, "train", 16)
    assert {path.suffix for path in folder.iterdir()} == {".lock"}
    assert open_document_index(shards, "train", 16).totals.documents == 8


def test_the_group_and_row_of_every_token_are_found(shards: DataSet, folder: Path) -> None:
    index = open_document_index(shards, "train", 16)
    token = 0
    for number, (lengths, rows) in enumerate(groups_of(index)):
        for length, row in zip(lengths, rows, strict=True):
            assert index.find(token) == index.find(token + length - 1) == (number, row)
            token += length
    assert token == index.totals.tokens


@pytest.mark.parametrize("damage", ["empty", "cut", "end", "header"])
def test_a_damaged_index_is_made_again(shards: DataSet, folder: Path, damage: str) -> None:
    intact = groups_of(open_document_index(shards, "train", 16))
    path = file_of(folder)
    data = path.read_bytes()
    changed = bytearray(data)
    changed[-1 if damage == "end" else -40] ^= 1
    path.write_bytes({"empty": b"", "cut": data[:-9]}.get(damage, bytes(changed)))
    assert groups_of(open_document_index(shards, "train", 16)) == intact
    assert path.read_bytes() == data


def test_a_group_that_is_damaged_is_reported_with_its_file(shards: DataSet, folder: Path) -> None:
    open_document_index(shards, "train", 16)
    path = file_of(folder)
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    index = open_document_index(shards, "train", 16)
    with pytest.raises(
        ShardCorruptError, match=r"\.index is damaged in group 0 .*remove that file"
    ):
        index.group(0)


def test_the_last_of_few_groups_has_few_empty_rows(folder: Path) -> None:
    generator = np.random.default_rng(0)
    documents = [np.array([1, *[5] * length, 2]) for length in generator.integers(1, 40, 300)]
    with data_set([documents]) as data:
        totals = open_document_index(data.opened, "train", 16).totals
    assert totals.groups > 4
    assert totals.groups * totals.rows_per_group - totals.rows <= 4


def test_a_cache_folder_that_cannot_be_written_is_an_error(
    shards: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot be kept in .*set XDG_CACHE_HOME"):
        open_document_index(shards, "train", 16)
