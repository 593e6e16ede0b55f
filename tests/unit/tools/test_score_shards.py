"""`megaback shards score`: a line per document, in the order of the shards."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from data_pipeline.build.command import build_shards
from data_pipeline.errors import DirectionMismatchError, OutputExistsError, SourceEmptyError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import Manifest
from data_pipeline.text.codec import Direction, TextCodec
from megaback.scoring.quality import QualityScorer
from tests.helpers.builds import make_settings
from tests.helpers.models import random_model, write_model
from tests.helpers.stored import document_ids
from tools import score_shards
from tools.score_shards import main

Codecs = Callable[..., TextCodec]
Score = Callable[..., Result]


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Score:
    """`score(shards, out, *options)` with two untrained models of the context 64."""
    place = tmp_path_factory.mktemp("models")
    models = {
        direction: write_model(place / direction.value, random_model(seed), codec(direction))
        for seed, direction in enumerate(Direction)
    }

    def run(shards: Path, out: Path | str, *options: str) -> Result:
        given = [f(direction) for direction in Direction for f in (_option, models.__getitem__)]
        words = [shards, "--out", out, "--device", "cpu", *given, *options]
        return CliRunner().invoke(main, list(map(str, words)))

    return run


def _option(direction: Direction) -> str:
    return f"--{direction.value}"


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_are_of_the_documents_in_order(score: Score, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"

    result = score(finished, out)

    assert result.exit_code == 0, result.stderr
    lines = lines_of(out.read_text())
    stored = list(document_ids(DataSet.open(finished), "train"))
    assert [line["document"] for line in lines] == list(range(len(stored)))
    assert [line["tokens"] + 1 for line in lines] == list(map(len, stored))
    shards = Manifest.load(finished).split("train")
    assert [line["shard"] for line in lines] == [
        shard.file for shard in shards for _ in range(shard.documents)
    ]
    assert {line["split"] for line in lines} == {"train"}
    assert f"{out}: {len(lines):,} documents" in result.stdout


def test_the_stored_direction_changes_no_score(
    score: Score, source: Path, codec: Codecs, tmp_path: Path, in_threads: None
) -> None:
    found = {}
    for direction in Direction:
        chosen = make_settings(source, codec(direction), val_fraction=0.1)
        shards = tmp_path / direction.value
        build_shards(chosen, codec(direction), shards, workers=1)
        out = tmp_path / f"{direction.value}.jsonl"
        result = score(shards, out, "--split", "val")
        assert result.exit_code == 0, result.stderr
        found[direction] = [
            {key: value for key, value in line.items() if key != "shard"}
            for line in lines_of(out.read_text())
        ]
    assert found[Direction.FORWARD] == found[Direction.BACKWARD]
    assert found[Direction.FORWARD]


def test_kills_and_tasks_change_no_byte(
    score: Score, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_shards, "_CHUNK_TOKENS", 1000)
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    assert score(finished, whole).exit_code == 0
    calls = iter(range(100))

    def failing(scorer: QualityScorer, documents: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return scored(scorer, documents)

    scored = QualityScorer.score
    monkeypatch.setattr(QualityScorer, "score", failing)
    assert score(finished, killed).exit_code != 0
    assert not killed.exists()
    result = score(finished, killed)
    assert "task 0 resumes after 3 chunks" in result.stderr
    assert killed.read_bytes() == whole.read_bytes()

    for task in ("1", "0"):
        result = score(finished, shared, "--tasks", "2", "--task-index", task)
        assert result.exit_code == 0, result.stderr
        assert shared.exists() == (task == "0")
    assert shared.read_bytes() == whole.read_bytes()
    assert "another --split" in score(finished, whole, "--split", "val").stderr
    assert score(finished, whole, "--dtype", "float32").exit_code == 0  # what auto chose
    assert "another --dtype" in score(finished, whole, "--dtype", "bfloat16").stderr


def test_a_wrong_pair_of_models_leaves_no_work_folder(
    score: Score, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same output can be named again with the right one."""
    manifest = Manifest.load(finished)
    examples = replace(manifest, row_tokens=manifest.frame_tokens)
    monkeypatch.setattr(Manifest, "read", lambda *_: examples)

    result = score(finished, tmp_path / "scores.jsonl")

    assert result.exit_code == DirectionMismatchError.exit_code
    assert not list(tmp_path.iterdir())


def test_outputs_and_empty_splits_that_are_refused(
    score: Score, finished: Path, copy: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "mine.jsonl"
    foreign.write_text('{"text": "mine"}\n')
    assert score(finished, foreign, "--overwrite").exit_code == OutputExistsError.exit_code
    assert foreign.read_text() == '{"text": "mine"}\n'
    assert score(finished, finished / "scores").exit_code == OutputExistsError.exit_code

    manifest = Manifest.load(copy)
    replace(manifest, shards=manifest.split("train")).save(copy)
    result = score(copy, tmp_path / "out.jsonl", "--split", "val")
    assert result.exit_code == SourceEmptyError.exit_code
    assert "choose another --split" in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
