"""The suites of `megaback eval`, on models with known results."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.text.codec import Direction, TextCodec
from tests.helpers.models import random_model, write_model
from tools.evaluate import main
from tools.suites.base import Evaluated, SuiteOptions
from tools.suites.passages import neighbors
from tools.suites.recall import first_is_best, instruction_recall, token_f1

Codecs = Callable[..., TextCodec]
WORDS = ["map", "road", "clock", "bottle", "letter", "wall", "captain", "sailor", "uncle", "river"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Path]:
    place = tmp_path_factory.mktemp("models")
    return {
        direction: write_model(place / direction.value, random_model(), codec(direction))
        for direction in Direction
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Definitions, a row with markers, and a row that is too long."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"instruction": f"Define the noun '{word}'.", "input": "", "output": f"It is a {number}."}
        for number, word in enumerate(WORDS)
    ]
    lines.append({"instruction": "Who?", "input": "<|im_end|>", "output": "<|im_start|>"})
    lines.append({"instruction": "a map " * 60, "output": "b"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(folder: Path, *arguments: object) -> Result:
    command = [folder, "--device", "cpu", "--max-new-tokens", 8, *arguments]
    return CliRunner().invoke(main, [str(part) for part in command])


def test_all_suites_write_a_table_and_json(
    folders: dict[Direction, Path],
    rows: Path,
    tiny_shards: Path,
    tiny_text_folder: Path,
    tmp_path: Path,
) -> None:
    out, predictions = tmp_path / "results.json", tmp_path / "predictions.jsonl"
    result = evaluate(
        folders[Direction.BACKWARD],
        *("--suite", "instruction-recall", "--suite", "reverse-dictionary", "--rows", rows),
        *("--suite", "passage-choice", "--passages", tiny_text_folder),
        *("--passage-characters", 30, "--forward", folders[Direction.FORWARD]),
        *("--suite", "bits-per-byte", "--shards", tiny_shards, "--limit", 40),
        *("--out", out, "--predictions", predictions),
    )

    assert result.exit_code == 0, result.output
    suites = json.loads(out.read_text())["suites"]
    assert {name: list(suite["metrics"]) for name, suite in suites.items()} == {
        "instruction-recall": ["exact match", "token F1"],
        "reverse-dictionary": [
            *("exact match", "choice of 10", "choice of 10, prior-normalized"),
        ],
        "passage-choice": ["reverse", "prior-normalized", "forward"],
        "bits-per-byte": ["bits/byte"],
    }
    recall, dictionary = suites["instruction-recall"], suites["reverse-dictionary"]
    assert (recall["rows"], recall["excluded"]) == (len(WORDS) + 1, 1)
    assert (dictionary["rows"], dictionary["excluded"]) == (len(WORDS), 0)
    assert suites["passage-choice"]["rows"] == 40
    for suite in suites.values():
        for metric in suite["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]
    lines = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert [line["suite"] for line in lines] == [
        *["instruction-recall"] * 11,
        *["reverse-dictionary"] * 10,
    ]
    assert lines[10]["response"] == "<|im_start|>"
    assert "bits/byte" in result.output


def test_a_single_row_has_no_interval(
    folders: dict[Direction, Path], rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    arguments = ("--suite", "instruction-recall", "--rows", rows, "--out", out)
    result = evaluate(folders[Direction.BACKWARD], *arguments, "--limit", 1)
    assert result.exit_code == 0, result.output
    metric = json.loads(out.read_text())["suites"]["instruction-recall"]["metrics"]["token F1"]
    assert (metric["rows"], metric["low"], metric["high"]) == (1, None, None)
    message = "instruction-recall: no 95% interval is shown: it needs at least 2 rows"
    assert message in result.stderr
    more = evaluate(folders[Direction.BACKWARD], *arguments, "--overwrite", "--limit", 2)
    assert "no 95% interval" not in more.stderr


def test_rows_may_have_other_columns(folders: dict[Direction, Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Who?", "answer": "He."}) + "\n")
    arguments = (folders[Direction.BACKWARD], "--suite", "instruction-recall", "--rows", rows)

    refused = evaluate(*arguments)
    columns = re.search(r"--columns (\S+=\w+)", refused.stderr)

    assert columns is not None, refused.stderr
    assert evaluate(*arguments, "--columns", columns[1]).exit_code == 0


def test_recall_counts_recovered_instructions(
    folders: dict[Direction, Path], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second prediction is replaced by the true instruction."""
    from tools.suites.base import read_examples

    evaluated = Evaluated(folders[Direction.BACKWARD], "cpu")
    examples = read_examples(str(rows), len(WORDS))
    real = evaluated.likeliest

    def half_right(given: list[str], tokens: int) -> list[object]:
        from dataclasses import replace

        return [
            replace(one, text=examples[at].instruction if at % 2 else "nothing alike")
            for at, one in enumerate(real(given, tokens))
        ]

    monkeypatch.setattr(evaluated, "likeliest", half_right)
    found = instruction_recall(evaluated, None, SuiteOptions(rows=str(rows), limit=len(WORDS)))
    assert found.metrics["exact match"].interval.value == 0.5
    assert found.metrics["token F1"].interval.value == 0.5
    assert found.metrics["exact match"].chance == 0.0  # all instructions differ
    assert found.metrics["token F1"].chance == pytest.approx(0.75)  # 3 of 4 words: Define the noun


def test_passages_longer_than_half_the_context_are_excluded(
    folders: dict[Direction, Path], tmp_path: Path
) -> None:
    """Each rare character is several tokens."""
    path = tmp_path / "texts.jsonl"
    texts = [f"the map {number} was sold to the captain" for number in range(12)]
    texts += ["\u16a0" * 20 + " " + "\u16a0" * 20 + " " + "a" for _ in range(3)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "results.json"
    result = evaluate(
        folders[Direction.BACKWARD],
        *("--suite", "passage-choice", "--passages", path, "--passage-characters", 10),
        *("--out", out),
    )
    assert result.exit_code == 0, result.output
    suite = json.loads(out.read_text())["suites"]["passage-choice"]
    assert (suite["rows"], suite["excluded"]) == (12, 3)


def test_bits_per_byte_matches_validation(
    folders: dict[Direction, Path], tiny_shards: Path, world: object
) -> None:
    from data_pipeline.loading.frame_store import FrameStore
    from data_pipeline.loading.loader import sequential_batches
    from data_pipeline.loading.rows import RowReader
    from data_pipeline.shards.data_set import DataSet
    from megaback.training import validation as evaluation
    from tools.suites.passages import bits_per_byte

    evaluated = Evaluated(folders[Direction.BACKWARD], "cpu")
    frames = FrameStore(DataSet.open(tiny_shards), "val")
    batches = sequential_batches(RowReader(frames, 64, Direction.BACKWARD), 0, 1, 4)
    expected = evaluation.evaluate(
        evaluated.model,
        batches,
        64,
        evaluated.codec.piece_num_bytes(),
        world,
        lambda: None,  # type: ignore[arg-type]
    )
    found = bits_per_byte(evaluated, None, SuiteOptions(shards=str(tiny_shards)))
    measured = found.metrics["bits/byte"].interval
    assert measured.value == pytest.approx(expected.whole.bits_per_byte, rel=1e-6)
    assert measured.low < measured.value < measured.high


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 20))
def test_neighbors_are_substrings_cut_before_whitespace(text: str, size: int) -> None:
    rest = text
    for item in neighbors(text, size):
        assert item.first + item.second in rest
        assert item.second[0].isspace()
        assert min(len(item.first), len(item.second)) >= size
        rest = rest[rest.index(item.first + item.second) + len(item.first + item.second) :]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Define the noun 'map'.", "define the NOUN: map", 1.0),
        ("a b c d", "a b", 2 / 3),
        ("a a", "a", 2 / 3),
        ("a", "b", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_token_f1(one: str, other: str, expected: float) -> None:
    assert token_f1(one, other) == token_f1(other, one) == pytest.approx(expected)


def test_ties_share_the_score() -> None:
    assert [first_is_best(values) for values in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0])] == [1, 0, 0.5]


@pytest.mark.parametrize(
    ("direction", "arguments", "exit_code", "message"),
    [
        (Direction.BACKWARD, ["--suite", "instruction-recall"], 10, "needs --rows"),
        (Direction.BACKWARD, ["--suite", "passage-choice"], 10, "needs --passages"),
        (Direction.BACKWARD, ["--suite", "bits-per-byte"], 10, "needs --shards"),
        (Direction.BACKWARD, ["--suite", "spelling"], 2, "instruction-recall"),
        (Direction.FORWARD, ["--suite", "instruction-recall", "--rows", "x"], 33, "writes forward"),
        (Direction.FORWARD, ["--suite", "passage-choice", "--passages", "x"], 33, "--forward"),
        (
            Direction.BACKWARD,
            ["--suite", "reverse-dictionary", "--rows", "x", "--word-pattern", "no group"],
            10,
            "one group",
        ),
        (Direction.BACKWARD, ["--suite", "instruction-recall", "--rows", "none"], 20, "none"),
    ],
)
def test_invalid_options_are_refused(
    direction: Direction,
    arguments: list[str],
    exit_code: int,
    message: str,
    folders: dict[Direction, Path],
) -> None:
    result = evaluate(folders[direction], *arguments)
    assert (result.exit_code, message in result.stderr) == (exit_code, True), result.output
