"""The val set of a small data set: a minimum of documents, chosen by their texts alone."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import command as build
from data_pipeline.build import val_minimum
from data_pipeline.build.plan import Task
from data_pipeline.build.task import TaskRecord, run_task
from data_pipeline.build.val_hashes import LowestHashes
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.verify import verify_data_set
from data_pipeline.sources.columns import ExampleColumns
from tests.helpers.builds import (
    Codecs,
    build_here,
    documents_of,
    hashes,
    make_settings,
    write_records,
    write_source,
)

pytestmark = pytest.mark.usefixtures("a_task_a_file")

NUM_FILES = 6


@given(st.lists(st.integers(0, 30), max_size=80))
def test_the_lowest_hashes_are_counted_exactly(values: list[int]) -> None:
    lowest = LowestHashes()
    for value in values:
        lowest.add((value << 11 | 5).to_bytes(8, "big"))
    assert lowest.counted() == tuple(sorted(Counter(values).items())[:10])


def lowest_texts(texts: list[str], number: int) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:number]


@pytest.fixture(scope="module")
def small_texts(english_documents: list[str]) -> list[str]:
    return english_documents[:60]


@pytest.mark.parametrize(
    ("documents", "expected"), [(9, 0), (10, 1), (35, 3), (60, 6), (150, 10), (250, 10)]
)
@pytest.mark.parametrize("changed", [{}, {"deduplicate": True}], ids=["plain", "selecting"])
def test_the_lowest_hashes_are_the_val_set_where_the_fraction_gives_too_few(
    documents: int,
    expected: int,
    changed: dict[str, bool],
    english_documents: list[str],
    codec: Codecs,
    tmp_path: Path,
) -> None:
    texts = list(dict.fromkeys(english_documents))[:documents]
    source = write_source(tmp_path / "source", texts, NUM_FILES)
    settings = make_settings(source, codec(), val_fraction=1e-6, **changed)
    manifest = build_here(settings, codec(), tmp_path / "shards")
    found = documents_of(tmp_path / "shards")
    assert sorted(found["val"]) == sorted(lowest_texts(texts, expected))
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    assert manifest.requested_val_fraction == (1e-6 if expected else None)
    assert all(
        (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64)
        < manifest.val_fraction
        for text in found["val"]
    )
    verify_data_set(tmp_path / "shards", workers=1)


def test_a_hash_that_a_float_rounds_up_is_in_the_val_set(codec: Codecs, tmp_path: Path) -> None:
    """Such as that of "row 5", the third lowest one here."""
    texts = [f"row {number}" for number in range(30)]
    source = write_source(tmp_path / "source", texts, 1)
    build_here(make_settings(source, codec(), val_fraction=0.01), codec(), tmp_path / "shards")
    assert sorted(documents_of(tmp_path / "shards")["val"]) == ["row 25", "row 5", "row 7"]


def test_a_fraction_that_gives_enough_changes_no_byte(
    source: Path, codec: Codecs, finished: Path
) -> None:
    manifest = Manifest.load(finished)
    assert manifest.total("val")["documents"] > 10
    assert manifest.requested_val_fraction is None
    assert "requested_val_fraction" not in json.loads((finished / "manifest.json").read_text())


def test_a_val_fraction_of_0_makes_no_val_set(
    small_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source", small_texts)
    settings = make_settings(source, codec(), val_fraction=0.0)
    assert not build_here(settings, codec(), tmp_path / "shards").split("val")


@pytest.mark.parametrize("changed", [{}, {"deduplicate": True, "limit_documents": 50}])
def test_workers_and_kills_do_not_change_the_val_set(
    small_texts: list[str], codec: Codecs, tmp_path: Path, changed: dict[str, object]
) -> None:
    source = write_source(tmp_path / "source", small_texts, NUM_FILES)
    settings = make_settings(source, codec(), val_fraction=1e-6, **changed)
    build_here(settings, codec(), tmp_path / "one", workers=1)
    out = tmp_path / "three"
    build_here(settings, codec(), out, workers=3)
    expected = hashes(tmp_path / "one")
    assert hashes(out) == expected
    build_here(settings, codec(), out)
    assert hashes(out) == expected
    for lost in (
        "manifest.json",
        ".build/task-00002.json",
        f".build/task-{NUM_FILES + 3:05d}.json",
    ):
        (out / lost).unlink(missing_ok=True)
        (out / "manifest.json").unlink(missing_ok=True)
        build_here(settings, codec(), out)
        assert hashes(out) == expected


def test_a_build_killed_while_filling_the_val_set_resumes(
    small_texts: list[str], codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", small_texts, NUM_FILES)
    settings = make_settings(source, codec(), val_fraction=1e-6)
    build_here(settings, codec(), tmp_path / "uninterrupted")
    with monkeypatch.context() as patch:
        done: list[int] = []

        def run_one(task: Task, out: Path, model_bytes: bytes) -> TaskRecord:
            if done:
                raise KeyboardInterrupt
            done.append(task.index)
            return run_task(task, out, model_bytes)

        patch.setattr(val_minimum, "run_task", run_one)
        with pytest.raises(KeyboardInterrupt):
            build_here(settings, codec(), tmp_path / "shards")
    assert not (tmp_path / "shards" / "manifest.json").exists()
    build_here(settings, codec(), tmp_path / "shards")
    assert hashes(tmp_path / "shards") == hashes(tmp_path / "uninterrupted")


def test_an_array_of_tasks_makes_the_same_val_set(
    small_texts: list[str],
    codec: Codecs,
    tokenizer_path: Path,
    tmp_path: Path,
    in_threads: None,
) -> None:
    source = write_source(tmp_path / "source", small_texts, NUM_FILES)
    given_options = [
        *("--source", str(source), "--tokenizer", str(tokenizer_path), "--val-fraction", "1e-6"),
        *("--tasks", str(NUM_FILES)),
    ]
    for index in range(NUM_FILES):
        command = [*given_options, "--task-index", str(index), "--out", str(tmp_path / "array")]
        result = CliRunner().invoke(build.main, command)
        assert result.exit_code == 0, result.output
    assert "--val-fraction was raised from 1e-06 to" in result.stdout
    whole = CliRunner().invoke(build.main, [*given_options, "--out", str(tmp_path / "pool")])
    assert whole.exit_code == 0
    assert hashes(tmp_path / "array") == hashes(tmp_path / "pool")


def test_equal_texts_stay_together_and_do_not_take_over_the_val_set(
    codec: Codecs, tmp_path: Path
) -> None:
    often = ["the same text"] * 40
    for number, texts in enumerate([often, [*often[:9], *map(str, range(30))]]):
        source = write_source(tmp_path / f"source{number}", texts, NUM_FILES)
        settings = make_settings(source, codec(), val_fraction=1e-6)
        build_here(settings, codec(), tmp_path / f"shards{number}")
        found = documents_of(tmp_path / f"shards{number}")
        assert not {*found["train"]} & {*found["val"]}
        assert sorted(found["train"] + found["val"]) == sorted(texts)
        assert (len(found["val"]) >= 3) == (number == 1)


def test_examples_have_a_val_set_too(small_texts: list[str], codec: Codecs, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"instruction": f"Number {number}?", "output": text[:100]}
        for number, text in enumerate(small_texts)
    ]
    for number in range(3):
        write_records(tmp_path / "rows" / f"{number}.jsonl", rows[number::3])
    settings = make_settings(
        tmp_path / "rows",
        codec(),
        val_fraction=0.001,
        frame_tokens=1024,
        examples=ExampleColumns(),
        row_tokens=256,
    )
    manifest = build_here(settings, codec(), tmp_path / "shards")
    totals = [manifest.total(split)["documents"] for split in ("train", "val")]
    assert totals == [54, 6]
    verify_data_set(tmp_path / "shards", workers=1)
