"""`megaback shards select`: the best documents, as they were, and everything else whole."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import BadRecordError, ConfigError, OutputExistsError
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.document_selection import ShardScores, best, main, select
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.recompress import recompress
from data_pipeline.shards.verify import verify_data_set
from data_pipeline.text.codec import TextCodec
from tests.helpers.stored import document_ids

Codecs = Callable[..., TextCodec]
Line = dict[str, Any]


def lines_of(shards: Path, split: str = "train") -> list[Line]:
    """Scores as `megaback shards score` writes them, with values that differ."""
    manifest = Manifest.load(shards)
    files = [one.file for one in manifest.split(split) for _ in range(one.documents)]
    return [
        {
            "split": split,
            "shard": file,
            "document": number,
            "tokens": len(ids) - 1,
            "quality": (number * 37) % 101 / 100,
            "mine": -number,
        }
        for number, (file, ids) in enumerate(
            zip(files, document_ids(DataSet.open(shards), split), strict=True)
        )
    ]


def write(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def scores(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scores") / "scores.jsonl", lines_of(finished))


def ids_of(shards: Path, split: str) -> list[list[int]]:
    return [ids.tolist() for ids in document_ids(DataSet.open(shards), split)]


def test_the_best_documents_are_kept_as_they_were(
    finished: Path, scores: Path, codec: Codecs, tmp_path: Path
) -> None:
    before, lines = Manifest.load(finished), lines_of(finished)
    out = tmp_path / "best"

    manifest = select(finished, scores, out, 0.3)

    kept = sorted(range(len(lines)), key=lambda number: -lines[number]["quality"])
    kept = sorted(kept[: round(0.3 * len(lines))])
    stored = ids_of(finished, "train")
    assert ids_of(out, "train") == [stored[number] for number in kept]
    assert ids_of(out, "val") == ids_of(finished, "val")
    assert verify_data_set(out) == manifest
    texts = [codec().render(stored[number]) for number in kept]
    assert manifest.total("train")["text_bytes"] == sum(
        len(text.encode("utf-8", "surrogatepass")) for text in texts
    )
    assert manifest.excluded == {**before.excluded, "score": len(lines) - len(kept)}
    of_scores = hashlib.sha256(scores.read_bytes()).hexdigest()
    assert manifest.source == (
        f"{before.source} ({len(kept)} of {len(lines)} documents, those with the highest quality "
        f"in scores with sha256 {of_scores})"
    )
    as_before = replace(
        manifest, shards=before.shards, source=before.source, excluded=before.excluded
    )
    assert as_before == before


def test_another_key_and_the_lowest_values(finished: Path, scores: Path, tmp_path: Path) -> None:
    """Shards without a kept document are omitted."""
    stored = ids_of(finished, "train")

    manifest = select(finished, scores, tmp_path / "out", 0.05, key="mine", lowest=True)

    kept = round(0.05 * len(stored))
    assert ids_of(tmp_path / "out", "train") == stored[-kept:]
    assert len(manifest.split("train")) < len(Manifest.load(finished).split("train"))
    assert "the lowest mine" in manifest.source


def test_both_splits_with_scores_share_the_fraction(finished: Path, tmp_path: Path) -> None:
    lines = [*lines_of(finished, "val"), *lines_of(finished)]
    manifest = select(finished, write(tmp_path / "both", lines), tmp_path / "out", 0.5)

    kept = sum(manifest.total(split)["documents"] for split in ("train", "val"))
    assert kept == round(0.5 * len(lines))


def test_no_split_loses_all_documents(finished: Path, tmp_path: Path) -> None:
    lines = [line | {"quality": -1.0} for line in lines_of(finished, "val")]
    scores = write(tmp_path / "both", [*lines, *lines_of(finished)])

    with pytest.raises(ConfigError, match="no val document is among the best"):
        select(finished, scores, tmp_path / "out", 0.05)

    assert not (tmp_path / "out").exists()


def test_a_dictionary_is_kept(finished: Path, scores: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    recompress(finished, small, Compression(level=5), 1024, workers=1)

    select(small, scores, tmp_path / "with", 0.5)
    select(finished, scores, tmp_path / "without", 0.5)

    manifest = verify_data_set(tmp_path / "with")
    assert manifest.dictionary_sha256 is not None
    assert manifest.fingerprint == Manifest.load(tmp_path / "without").fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "ends before document"),
        (lambda lines: [*lines, lines[-1]], "not expected"),
        (lambda lines: [lines[1], *lines], "document 0 of train"),
        (lambda lines: [{**lines[0], "shard": "train-00009-00000.zst"}, *lines[1:]], "document 0"),
        (lambda lines: [{**lines[0], "quality": "1"}, *lines[1:]], "'quality' is not a finite"),
        (lambda lines: [{"mine": 1, **lines[0]}, *({} for _ in lines[1:])], "document 1 of"),
        (lambda lines: [{k: v for k, v in lines[0].items() if k != "quality"}], "no 'quality'"),
        (lambda lines: [{**lines[0], "quality": True}, *lines[1:]], "'quality' is not a finite"),
        (lambda lines: [{**lines[0], "tokens": -1}, *lines[1:]], "'tokens' is not a number"),
        (lambda lines: [{**lines[0], "tokens": lines[0]["tokens"] + 1}, *lines[1:]], "of other"),
        (lambda _: [{"split": []}], "not expected"),
        (lambda _: [], "no lines"),
    ],
)
def test_scores_of_other_documents_are_refused(
    finished: Path, change: Callable[[list[Line]], list[Line]], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "scores.jsonl", change(lines_of(finished)))

    with pytest.raises(BadRecordError, match=message):
        select(finished, path, tmp_path / "out", 0.9)

    assert [one.name for one in tmp_path.iterdir()] == ["scores.jsonl"]


def test_instruction_examples_are_refused(
    finished: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = DataSet.open(finished)
    monkeypatch.setattr(opened, "manifest", replace(opened.manifest, row_tokens=64))
    monkeypatch.setattr(DataSet, "open", lambda _: opened)
    with pytest.raises(ConfigError, match="instruction examples"):
        select(finished, scores, tmp_path / "out", 0.5)


def test_only_results_of_the_command_are_overwritten(
    finished: Path, scores: Path, tmp_path: Path
) -> None:
    out = tmp_path / "best"
    words = [finished, "--scores", scores, "--keep-fraction", "0.5", "--out", out]

    def invoke(*more: str) -> int:
        return CliRunner().invoke(main, list(map(str, (*words, *more)))).exit_code

    assert invoke() == 0
    assert invoke() == OutputExistsError.exit_code
    assert invoke("--overwrite", "--lowest") == 0
    (out / "mine.txt").write_text("mine")
    assert invoke("--overwrite") == OutputExistsError.exit_code
    assert "lowest" in Manifest.load(out).source


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
    st.booleans(),
)
def test_no_excluded_document_is_better_than_a_kept_one(
    shards: list[list[int]], keep: float, lowest: bool
) -> None:
    sign = -1 if lowest else 1
    given_scores = [ShardScores(np.array(one, dtype=float), np.array(one)) for one in shards]

    chosen = best(given_scores, keep, lowest=lowest)

    assert [len(one) for one in chosen] == [len(one) for one in shards]
    values = [(sign * value, -at) for at, value in enumerate(np.concatenate(shards).tolist())]
    kept = np.concatenate(chosen)
    assert kept.sum() == max(1, round(keep * len(values)))
    worst = min(value for value, is_kept in zip(values, kept, strict=True) if is_kept)
    assert all(value < worst for value, is_kept in zip(values, kept, strict=True) if not is_kept)
