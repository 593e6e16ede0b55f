"""Benchmarks are scored on the texts of lm_eval's tasks, in both directions on the same rows."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data_pipeline.text.codec import Direction, TextCodec
from megaback.scoring.choices import Scoring
from tests.helpers.benchmark_rows import save_benchmarks
from tests.helpers.models import random_model, write_model
from tools.evaluate import main

Codecs = Callable[..., TextCodec]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("openbookqa", "winogrande", "mmlu", "lambada")
    return save_benchmarks(tmp_path_factory.mktemp("saved"), *names)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        one: write_model(place / one.value, random_model(), codec(one), 200) for one in Direction
    }


def evaluate(folder: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in (folder, "--device", "cpu", *arguments)])


def test_both_directions_are_compared_on_the_same_rows(
    saved: Path, folders: dict[Direction, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    names = "openbookqa,winogrande,mmlu,lambada"
    arguments = ("--suite", names, "--benchmarks", saved, "--against", folders[Direction.FORWARD])
    picture = tmp_path / "benchmarks.png"
    result = evaluate(
        folders[Direction.BACKWARD],
        *arguments,
        *("--scoring", "ratio", "--out", out, "--plot", picture),
    )

    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    backward, forward = report["suites"], report["against"]["suites"]
    assert [*backward] == [*forward] == names.split(",")
    for name in ("openbookqa", "winogrande", "mmlu"):
        assert set(backward[name]["metrics"]) == {one.value for one in Scoring}
        difference = report["differences"][name]
        mine, other = backward[name]["metrics"]["ratio"], forward[name]["metrics"]["acc"]
        assert difference["value"] == pytest.approx(other["value"] - mine["value"], abs=1e-5)
        assert difference["rows"] == 3
    assert set(forward["openbookqa"]["metrics"]) == {"acc", "acc_norm"}
    assert backward["openbookqa"]["task"] == "openbookqa 1.0"
    assert backward["openbookqa"]["source"] == str(saved)
    assert forward["lambada"]["metrics"]["perplexity"]["value"] > 1
    assert "bits/byte" in backward["lambada"]["metrics"]
    assert "ratio" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "normalized" not in result.output


def test_rows_that_do_not_fit_are_counted(saved: Path, codec: Codecs, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", random_model(), codec(Direction.FORWARD), 24)
    out = tmp_path / "out.json"
    result = evaluate(folder, "--suite", "mmlu", "--benchmarks", saved, "--out", out)

    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["suites"]["mmlu"]["truncated"] == 3


def test_other_suites_are_refused(saved: Path, folders: dict[Direction, Path]) -> None:
    folder = folders[Direction.FORWARD]
    result = evaluate(folder, "--suite", "openbookqa,nothing")
    assert result.exit_code == 2
    result = evaluate(folder, "--suite", "bits-per-byte", "--against", folder)
    assert "compares benchmarks only" in result.output
    result = evaluate(folder, "--suite", "openbookqa", "--against-direction", "forward")
    assert "--against, which is missing" in result.output
    result = evaluate(folder, "--suite", "lambada", "--plot", saved / "a.png")
    assert "no suite has one" in result.output
    result = evaluate(folder, "--suite", "openbookqa", "--plot", saved / "a.pdf")
    assert "pictures are PNG files" in result.output
