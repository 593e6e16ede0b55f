"""A task always writes the same bytes, and its record is valid only with its files."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build.plan import Task, make_plan
from data_pipeline.build.task import (
    TaskRecord,
    finished_record,
    notes_path,
    read_notes,
    record_path,
    run_task,
    shards_folder,
)
from data_pipeline.build.task_input import belongs_to_val
from data_pipeline.shards.manifest import SPLITS
from tests.helpers.builds import Codecs, hashes, make_settings, write_source

TEXTS = [f"{'a text of some words ' * (number % 9)}{number}" for number in range(120)]


def task_of(source: Path, codec: Codecs, **changed: object) -> Task:
    (task,) = make_plan(make_settings(source, codec(), **changed), 1).tasks
    return task


def done(task: Task, out: Path, model_bytes: bytes) -> TaskRecord:
    """The record of a task that is run in a folder with the subfolder of a plan."""
    record_path(out, 0).parent.mkdir(parents=True, exist_ok=True)
    return run_task(task, out, model_bytes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), [*TEXTS, TEXTS[3]], 2)


@pytest.mark.parametrize("changed", [{}, {"deduplicate": True}], ids=["plain", "staged"])
def test_a_task_writes_the_same_bytes_twice_and_is_then_done(
    source: Path, codec: Codecs, tmp_path: Path, changed: dict[str, bool]
) -> None:
    task = task_of(source, codec, **changed)
    model_bytes = codec().model_bytes
    out, again = tmp_path / "out", tmp_path / "again"
    assert finished_record(task, out) is None
    record = done(task, out, model_bytes)
    assert finished_record(task, out) == record
    assert done(task, again, model_bytes) == record
    assert hashes(again) == hashes(out)
    assert done(task, out, model_bytes) == record  # over existing files
    assert record.documents == len(TEXTS) + 1
    assert record.tokens == sum(len(codec().encode_document(text)) for text in [*TEXTS, TEXTS[3]])


def test_hashes_decide_splits_and_notes_record_them(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    task = task_of(source, codec, deduplicate=True)
    record = done(task, tmp_path, codec().model_bytes)
    is_val = [belongs_to_val(hashlib.sha256(text.encode()).digest(), 0.1) for text in TEXTS]
    is_val.append(is_val[3])
    counts = {
        split: sum(shard.documents for shard in record.shards if shard.split == split)
        for split in SPLITS
    }
    assert counts == {"train": is_val.count(False), "val": is_val.count(True)}
    notes = read_notes(task, tmp_path)
    assert notes["split"].tolist().count(SPLITS.index("val")) == counts["val"] > 0
    assert len({*zip(notes["high"].tolist(), notes["low"].tolist(), strict=True)}) == len(TEXTS)


Spoil = Callable[[Task, Path], object]


def first_shard(task: Task, out: Path) -> Path:
    return min(shards_folder(task, out).glob("*.zst"))


SPOILT: dict[str, Spoil] = {
    "no shard": lambda task, out: first_shard(task, out).unlink(),
    "a shorter shard": lambda task, out: first_shard(task, out).write_bytes(b"short"),
    "no notes": lambda task, out: notes_path(task, out).unlink(),
    "fewer notes": lambda task, out: notes_path(task, out).write_bytes(
        notes_path(task, out).read_bytes()[:-25]
    ),
    "notes of another split": lambda task, out: notes_path(task, out).write_bytes(
        bytes(notes_path(task, out).stat().st_size)
    ),
    "no record": lambda task, out: record_path(out, task.index).unlink(),
    "half a record": lambda task, out: record_path(out, task.index).write_bytes(
        record_path(out, task.index).read_bytes()[:-30]
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_record_that_does_not_match_its_files_is_invalid(
    source: Path, codec: Codecs, tmp_path: Path, how: str
) -> None:
    task = task_of(source, codec, deduplicate=True)
    record = done(task, tmp_path, codec().model_bytes)
    SPOILT[how](task, tmp_path)
    assert finished_record(task, tmp_path) is None
    assert done(task, tmp_path, codec().model_bytes) == record
    assert finished_record(task, tmp_path) == record


def test_a_task_of_other_settings_or_portions_is_not_done(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    task = task_of(source, codec)
    done(task, tmp_path, codec().model_bytes)
    others = [
        replace(task, settings=replace(task.settings, compression_level=9)),
        replace(task, portions=task.portions[:1]),
        replace(task, portions=task.portions[::-1]),
    ]
    assert [finished_record(other, tmp_path) for other in others] == [None] * 3


@given(excluded=st.dictionaries(st.sampled_from(["empty", "length"]), st.integers(1, 1000)))
def test_a_saved_record_loads_equal(
    tmp_path_factory: pytest.TempPathFactory, excluded: dict[str, int]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    record = TaskRecord(task_sha256="a" * 64, shards=(), excluded=excluded)
    path = folder / "task-00000.json"
    record.save(path)
    assert TaskRecord.load(path, "a" * 64, folder) == record
    assert TaskRecord.load(path, "b" * 64, folder) is None
