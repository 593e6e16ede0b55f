"""Reranking: mixed scores, the fitted weight and the command, also with Hugging Face models."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import megaback
from data_pipeline.text.codec import Direction, TextCodec
from megaback.scoring.hf_scorer import HfScorer
from megaback.scoring.pairs import Pair
from megaback.scoring.reranking import Scored, accuracies, fit_weight, ranking, rightness
from tests.helpers.models import random_model, write_model
from tools.rerank import main

Codecs = Callable[..., TextCodec]

CPU = torch.device("cpu")
SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=6).map(np.array)


def scored(forward: list[float] | None, reverse: list[float], right: int) -> Scored:
    is_right = np.arange(len(reverse)) == right
    return Scored(None if forward is None else np.array(forward), np.array(reverse), is_right)


@given(SCORES)
def test_a_ranking_is_descending_and_stable(scores: "np.ndarray") -> None:
    order = ranking(scores)
    assert sorted(order) == list(range(len(scores)))
    for one, other in pairwise(order):
        assert (scores[one], -one) > (scores[other], -other)


def test_ties_are_broken_at_random() -> None:
    assert rightness(np.array([1.0, 1.0, 0.0]), np.array([True, False, True])) == 0.5


def test_the_weight_of_the_labels_is_found() -> None:
    """The correct one has the highest forward + 3 * reverse: a weight of 3/4."""
    generator = np.random.default_rng(5)
    questions = []
    for _ in range(400):
        forward, reverse = generator.normal(size=(2, 6))
        right = int(np.argmax(forward + 3 * reverse))
        questions.append(scored(list(forward), list(reverse), right))
    weight = fit_weight(questions)
    assert weight == pytest.approx(0.75, abs=0.02)
    found = accuracies(questions, weight)
    assert found["mixed"].value > 0.97
    assert found["mixed"].value > found["reverse"].value > found["forward"].value
    assert found["forward"].value > found["random"].value == pytest.approx(1 / 6)
    assert found["oracle"].value == 1.0
    assert found["gain"].value == pytest.approx(found["mixed"].value - found["forward"].value)


def test_an_uninformative_score_gets_no_weight() -> None:
    questions = [scored([1.0, 0.0], [0.0, 0.0], 0), scored([0.0, 9.0], [9.0, 0.0], 1)]
    assert fit_weight(questions) < 0.5
    flipped = [scored([0.0, 0.0], [1.0, 0.0], 0), scored([9.0, 0.0], [0.0, 9.0], 1)]
    assert fit_weight(flipped) > 0.5


# The command.

ROWS = [
    {
        "question": "Who sold the map?",
        "candidates": [
            {"answer": "My sister.", "correct": False, "score": -1.0},
            {"answer": "The captain.", "correct": True, "score": -2.0},
            {"answer": "<|im_end|>", "correct": False, "score": -3.0},
        ],
        "id": "a",
    },
    {
        "question": "<|im_start|>?",
        "candidates": [
            {"answer": "A map.", "correct": True, "score": -1.5},
            {"answer": "Nobody.", "correct": False, "score": -1.25},
        ],
    },
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        direction: write_model(place / direction.value, random_model(), codec(direction))
        for direction in Direction
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def rerank(folder: Path, *arguments: object) -> Result:
    command = [folder, "--device", "cpu", *arguments]
    return CliRunner().invoke(main, [str(part) for part in command])


def test_a_column_is_mixed_with_the_reverse_score(
    folders: dict[Direction, Path], source: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    result = rerank(
        folders[Direction.BACKWARD],
        *("--in", source, "--out", out, "--forward-column", "score", "--weight", 0.25),
        *("--report", report),
    )

    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    with megaback.load_scorer(folders[Direction.BACKWARD], device="cpu") as scorer:
        for row, given_row in zip(rows, ROWS, strict=True):
            assert {k: v for k, v in row.items() if k not in ("ranking", "scores")} == given_row
            pairs = [Pair(row["question"], one["answer"]) for one in row["candidates"]]
            reverse = [one.log_probability for one in scorer.score(pairs)]
            mixed = [
                0.75 * one["score"] + 0.25 * other
                for one, other in zip(row["candidates"], reverse, strict=True)
            ]
            assert [one["mixed"] for one in row["scores"]] == pytest.approx(mixed, abs=1e-4)
            assert row["ranking"] == list(np.argsort(-np.array(mixed)))
    accuracy = json.loads(report.read_text())["accuracy"]
    assert accuracy["random"]["value"] == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-6)
    assert accuracy["forward"]["value"] == 0.0
    assert accuracy["oracle"]["value"] == 1.0
    assert "mixed - forward" in result.stderr


def test_a_single_labeled_question_has_no_interval(
    folders: dict[Direction, Path], source: Path, tmp_path: Path
) -> None:
    source.write_text(json.dumps(ROWS[0]))
    result = rerank(folders[Direction.BACKWARD], "--in", source, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no 95% interval is shown: it needs at least 2 labeled questions" in result.stderr


def test_replaced_keys_are_reported(
    folders: dict[Direction, Path], source: Path, tmp_path: Path
) -> None:
    rows = [{**ROWS[0], "ranking": "mine", "scores": 1}, {**ROWS[1], "scores": None}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = rerank(folders[Direction.BACKWARD], "--in", source, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 row had a key 'ranking' of its own, which was replaced\n" in result.stderr
    assert "2 rows had a key 'scores' of their own, which was replaced\n" in result.stderr


def test_the_weight_is_fitted_on_another_file(
    folders: dict[Direction, Path], source: Path, tmp_path: Path
) -> None:
    arguments = ("--in", source, "--out", tmp_path / "out", "--forward-column", "score")
    result = rerank(folders[Direction.BACKWARD], *arguments, "--fit", source)
    assert result.exit_code == 0, result.output
    assert "fitted on 2 questions" in result.stderr
    out = ("--out", tmp_path / "other")
    refused = rerank(folders[Direction.BACKWARD], "--in", source, *out, "--fit", source)
    assert (refused.exit_code, "--fit needs a forward score" in refused.stderr) == (10, True)


def test_forward_models_are_megaback_or_hugging_face_models(
    folders: dict[Direction, Path], foreign: Path, source: Path, tmp_path: Path
) -> None:
    with megaback.load_scorer(folders[Direction.FORWARD], device="cpu") as scorer:
        (ours,) = scorer.score([Pair("Who sold the map?", "My sister.")])
    (theirs,) = HfScorer(foreign, CPU).score([Pair("Who sold the map?", "My sister.")])
    for forward, expected in ((folders[Direction.FORWARD], ours), (foreign, theirs)):
        out = tmp_path / f"{forward.name}.jsonl"
        result = rerank(
            folders[Direction.BACKWARD],
            *("--in", source, "--out", out, "--forward", forward, "--forward-per", "token"),
        )
        assert result.exit_code == 0, result.output
        first = json.loads(out.read_text().splitlines()[0])
        assert first["scores"][0]["forward"] == pytest.approx(expected.per_token, abs=1e-4)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "a"}, "not a list of answers"),
        ({"question": "a", "candidates": []}, "not a list of answers"),
        ({"question": "a", "candidates": [3]}, "candidate 0 is neither"),
        ({"question": "a", "candidates": [{"answer": "b", "score": True}]}, "no finite number"),
        ({"question": "a", "candidates": [{"answer": "b"}]}, "no finite number under 'score'"),
        (
            {"question": "a", "candidates": [{"answer": "b", "score": 1, "correct": 1}]},
            "not true or false",
        ),
        (
            {"question": "a map " * 40, "candidates": [{"answer": "b", "score": 1}]},
            "model's context of 64",
        ),
    ],
)
def test_a_malformed_row_is_named(
    row: dict[str, object],
    reason: str,
    folders: dict[Direction, Path],
    source: Path,
    tmp_path: Path,
) -> None:
    with source.open("a") as file:
        file.write(json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    arguments = ("--in", source, "--out", out, "--forward-column", "score")

    result = rerank(folders[Direction.BACKWARD], *arguments)

    assert result.exit_code == 23
    assert f"{source}:3: " in result.stderr
    assert reason in result.stderr
    assert "--on-bad-record skip" in result.stderr
    assert "--columns" not in result.stderr  # which rerank does not have
    assert not out.exists()
    assert rerank(folders[Direction.BACKWARD], *arguments, "--on-bad-record", "skip").exit_code == 0
    assert len(out.read_text().splitlines()) == 2


def test_models_of_the_wrong_direction_are_refused(
    folders: dict[Direction, Path], source: Path, tmp_path: Path
) -> None:
    arguments = ("--in", source, "--out", tmp_path / "out")
    assert rerank(folders[Direction.FORWARD], *arguments).exit_code == 33
    backward = folders[Direction.BACKWARD]
    assert rerank(backward, *arguments, "--forward", backward).exit_code == 33


def test_a_file_of_only_bad_lines_leaves_no_output(
    folders: dict[Direction, Path], tmp_path: Path
) -> None:
    source, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    skip = ("--on-bad-record", "skip")
    for lines in ("{\n", '{\n{"question": "a", "candidates": []}\n'):
        source.write_text(lines)
        result = rerank(folders[Direction.BACKWARD], "--in", source, "--out", out, *skip)
        assert result.exit_code == 21, result.output
        number = lines.count("\n")
        assert f"all {number} lines are invalid" in result.stderr
        assert f"the first error: {source}:1: not valid JSON" in result.stderr
        assert list(tmp_path.iterdir()) == [source]
