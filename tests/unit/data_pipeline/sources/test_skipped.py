"""Malformed records: counted by cause and place, and skipped only on request."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import command as build
from data_pipeline.build.plan import Plan
from data_pipeline.errors import BadRecordError, OutputExistsError, SourceEmptyError
from data_pipeline.shards.inspection import main as inspect
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.skipped import (
    Skipped,
    count_skipped,
    merged,
    num_skipped,
    skipped_from_json,
    skipped_to_json,
)
from data_pipeline.tokenizer.train_tokenizer import main as tokenizer_main
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from tests.helpers.builds import Codecs, build_here, hashes, make_settings, write_records

pytestmark = pytest.mark.usefixtures("a_task_a_file")

NUM_FILES = 4
BAD_LINES = ['{"text": "cut', "[1]", '{"body": "x"}', '{"text": null}', '{"text": 5}']
CAUSES = {
    "not valid JSON": 1,
    "not a JSON object": 1,
    "no column 'text'": 1,
    "column 'text' is null": 1,
    "column 'text' is of type int, not text": 1,
}


@pytest.fixture
def bad_source(tmp_path: Path, english_documents: list[str]) -> Path:
    """Four files; in the last two, every kind of bad line is between good ones."""
    folder = tmp_path / "source"
    for number in range(NUM_FILES):
        texts = english_documents[number * 10 : number * 10 + 10]
        write_records(folder / f"{number}.jsonl", [{"text": text} for text in texts])
        if number >= 2:
            with (folder / f"{number}.jsonl").open("a") as file:
                file.write("\n".join([*BAD_LINES, json.dumps({"text": "the last one"})]) + "\n")
    return folder


def all_bad(path: Path, lines: int = 12) -> Path:
    path.write_text('{"text": null}\n' * lines)
    return path


skips = st.lists(
    st.tuples(
        st.sampled_from(["files", "records", "parts"]),
        st.sampled_from("abc"),
        st.sampled_from(["1", "2", "3", "4", "5"]),
    )
)


@given(found=skips, cuts=st.lists(st.integers(0, 20), max_size=4))
def test_counts_do_not_depend_on_the_split_into_tasks(
    found: list[tuple[str, str, str]], cuts: list[int]
) -> None:
    whole: Skipped = {}
    for kind, cause, place in found:
        count_skipped(whole, kind, cause, place)
    parts: list[Skipped] = []
    bounds = [0, *sorted(cuts), len(found)]
    for start, stop in pairwise(bounds):
        parts.append({})
        for kind, cause, place in found[start:stop]:
            count_skipped(parts[-1], kind, cause, place)
    total = merged(parts)
    assert total == merged([whole])
    assert sum(num_skipped(total, kind) for kind in total) == len(found)
    assert skipped_from_json(json.loads(json.dumps(skipped_to_json(total)))) == total


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_records_are_counted_by_cause_and_named_by_line(
    bad_source: Path, codec: Codecs, tmp_path: Path, workers: int
) -> None:
    settings = make_settings(bad_source, codec(), on_bad_record="skip")
    manifest = build_here(settings, codec(), tmp_path / "shards", workers)
    records = manifest.skipped["records"]
    assert {cause: tally.count for cause, tally in records.items()} == {
        cause: 2 * number for cause, number in CAUSES.items()
    }
    assert records["not a JSON object"].first == tuple(
        f"{bad_source / f'{number}.jsonl'}:12: a JSON list, not an object with columns"
        for number in (2, 3)
    )
    assert manifest.excluded["bad_record"] == 2 * len(BAD_LINES)
    assert Manifest.load(tmp_path / "shards") == manifest
    output = CliRunner().invoke(inspect, [str(tmp_path / "shards")]).stdout
    assert "2 records skipped: not a JSON object" in output
    as_json = json.loads(CliRunner().invoke(inspect, [str(tmp_path / "shards"), "--json"]).stdout)
    assert as_json["skipped"]["records"]["column 'text' is null"]["count"] == 2


def test_the_first_ten_bad_records_of_each_cause_are_named(codec: Codecs, tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", [{"text": "good"}])
    source.write_text(source.read_text() + '{"text": null}\n' * 15)
    settings = make_settings(source, codec(), on_bad_record="skip", val_fraction=0.0)
    manifest = build_here(settings, codec(), tmp_path / "shards")
    tally = manifest.skipped["records"]["column 'text' is null"]
    assert tally.count == 15
    assert [place.split(": ")[0] for place in tally.first] == [
        f"{source}:{line}" for line in range(2, 12)
    ]


def test_a_build_stopped_by_a_bad_record_resumes_with_skip(
    bad_source: Path, codec: Codecs, tmp_path: Path
) -> None:
    stopping = make_settings(bad_source, codec())
    skipping = make_settings(bad_source, codec(), on_bad_record="skip")
    out = tmp_path / "shards"
    with pytest.raises(BadRecordError, match=r"2\.jsonl:11: .*`on_bad_record` skip$"):
        build_here(stopping, codec(), out)
    kept = {path: path.stat().st_mtime_ns for path in (out / ".build").glob("task-*.json")}
    assert len(kept) >= 2
    build_here(skipping, codec(), out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    build_here(skipping, codec(), tmp_path / "uninterrupted")
    assert hashes(out) == hashes(tmp_path / "uninterrupted")


def test_tasks_with_skipped_records_are_repeated_without_skip(
    bad_source: Path, codec: Codecs, tmp_path: Path
) -> None:
    stopping = make_settings(bad_source, codec())
    skipping = make_settings(bad_source, codec(), on_bad_record="skip")
    out = tmp_path / "shards"
    build_here(skipping, codec(), out)
    before = hashes(out)
    with pytest.raises(OutputExistsError, match="skipped 10 malformed records"):
        build_here(stopping, codec(), out)
    assert hashes(out) == before
    (out / "manifest.json").unlink()
    with pytest.raises(BadRecordError, match=r"2\.jsonl:11"):
        build_here(stopping, codec(), out)
    build_here(skipping, codec(), out)
    assert hashes(out) == before


def test_without_bad_records_skip_does_not_change_the_data_set(
    source: Path, codec: Codecs, copy: Path, finished: Path
) -> None:
    build_here(make_settings(source, codec(), on_bad_record="skip"), codec(), copy)
    assert hashes(copy) == hashes(finished)


def test_a_planned_build_can_skip_bad_records(
    bad_source: Path, codec: Codecs, tokenizer_path: Path, tmp_path: Path, in_threads: None
) -> None:
    out = tmp_path / "shards"
    given = ["--source", str(bad_source), "--tokenizer", str(tokenizer_path), "--out", str(out)]
    stopped = CliRunner().invoke(build.main, given)
    assert stopped.exit_code == BadRecordError.exit_code
    finished = CliRunner().invoke(build.main, ["--out", str(out), "--on-bad-record", "skip"])
    assert finished.exit_code == 0, finished.output
    assert "2 records skipped: not valid JSON" in finished.stdout
    assert Plan.load(out).settings.on_bad_record == "skip"


def test_if_every_record_is_bad_the_causes_are_reported(codec: Codecs, tmp_path: Path) -> None:
    source = all_bad(tmp_path / "a.jsonl")
    settings = make_settings(source, codec(), on_bad_record="skip")
    with pytest.raises(SourceEmptyError) as caught:
        build_here(settings, codec(), tmp_path / "shards")
    assert f"12 x column 'text' is null; the first: {source}:1: " in str(caught.value)
    with pytest.raises(SourceEmptyError, match=r"12 x column 'text' is null; .*a\.jsonl:1"):
        train_tokenizer(str(source), tmp_path / "out", on_bad_record="skip")


def test_tokenizer_training_reports_skipped_records_and_the_option(
    bad_source: Path, tmp_path: Path
) -> None:
    given = ["--source", str(bad_source), "--vocab-size", "400", "--out", str(tmp_path / "out")]
    stopped = CliRunner().invoke(tokenizer_main, given)
    assert stopped.exit_code == BadRecordError.exit_code
    assert stopped.stderr.rstrip().endswith("--on-bad-record skip")
    result = CliRunner().invoke(tokenizer_main, [*given, "--on-bad-record", "skip"])
    assert "2 records skipped: not valid JSON" in result.stdout
    assert f"{bad_source / '2.jsonl'}:11" in result.stdout
    report = json.loads((tmp_path / "out" / "tokenizer_report.json").read_text())
    assert report["skipped"]["records"]["not valid JSON"]["count"] == 2
