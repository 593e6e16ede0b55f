"""`megaback backtranslate`: scores, resumption after kills, tasks, selection and errors."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from data_pipeline.common.locks import locked
from data_pipeline.errors import OutputExistsError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.weights.model_folder import load_model_folder
from tests.helpers.models import write_chat_model
from tests.helpers.paths import ROOT
from tools.backtranslate import main
from tools.resumable_chunks import ResumableChunks
from tools.resumable_output import require_plan, work_folder

Codecs = Callable[..., TextCodec]
Translate = Callable[..., Result]

CONTEXT_TOKENS = 48
TEXTS = [
    *("a map", "the end", "  the end ", "", "<|im_end|> is text"),
    *("word " * 60, "It was late.", "She said no.", "the sea", "an old man"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Path]:
    """An untrained model per direction that generates end markers."""
    return {
        direction: write_chat_model(
            tmp_path_factory.mktemp(direction.value), codec(direction), CONTEXT_TOKENS, seed
        )
        for seed, direction in enumerate(Direction)
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def translate(folders: dict[Direction, Path], source: Path, tmp_path: Path) -> Translate:
    """`translate(*options)`: runs the command, which writes `tmp_path / "out.jsonl"`."""

    def run(*options: object, out: Path = tmp_path / "out.jsonl") -> Result:
        command = [
            folders[Direction.BACKWARD],
            "--in",
            source,
            "--out",
            out,
            "--max-new-tokens",
            20,
        ]
        command += ["--batch-size", 2, "--device", "cpu", "--temp", 1.0, *options]
        return CliRunner().invoke(main, [str(part) for part in command])

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_instruction_with_the_best_round_trip_score_is_kept(
    translate: Translate, folders: dict[Direction, Path], tmp_path: Path
) -> None:
    result = translate("--forward", folders[Direction.FORWARD], "--num-samples", 6)

    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out.jsonl")
    assert len(rows) > 3
    assert f"{len(rows)} examples from 9 texts" in result.output  # one is a duplicate
    assert "1 (empty)" in result.output
    assert "1 (too long)" in result.output
    numbers = [int(row["source"].partition(":")[2]) for row in rows]
    assert numbers == sorted(numbers)
    forward, _, codec = load_model_folder(folders[Direction.FORWARD], torch.device("cpu"))
    answering = ChatFormat(codec)
    for number, row in zip(numbers, rows, strict=True):
        instruction, text = row["instruction"], row["output"]
        assert text == TEXTS[number - 1].strip()
        assert row["input"] == ""
        written = answering.written_ids(text)
        likelihood, prior = log_probabilities(
            forward,
            [Continuation(answering.prompt_ids(one), written) for one in (instruction, "")],
        )
        assert row["cycle_log_probability"] == pytest.approx(likelihood, abs=1e-4)
        assert row["score"] == pytest.approx((likelihood - prior) / len(written), abs=1e-4)
        assert row["log_probability"] < 0
    assert "<|im_end|> is text" in [row["output"] for row in rows]


@pytest.fixture
def expected(translate: Translate, tmp_path: Path) -> bytes:
    """Output of an uninterrupted run."""
    result = translate(out=tmp_path / "expected.jsonl")
    assert result.exit_code == 0, result.output
    return (tmp_path / "expected.jsonl").read_bytes()


def test_tasks_in_any_order_write_the_same_output(
    translate: Translate, expected: bytes, tmp_path: Path
) -> None:
    for task in (2, 0):
        result = translate("--tasks", 3, "--task-index", task)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "out.jsonl").exists()
    assert "1 of 3 are still missing" in result.output
    translate("--tasks", 3, "--task-index", 1)
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert b"the end" in expected


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.65, 0.999])
def test_a_run_resumes_from_a_truncated_part(
    kept: float, translate: Translate, expected: bytes, tmp_path: Path
) -> None:
    translate()
    work = work_folder(tmp_path / "out.jsonl")
    whole = (work / "part-00000.jsonl").read_bytes()
    (work / "part-00000.jsonl").unlink()
    left = whole[: int(len(whole) * kept)]
    (work / "part-00000.unfinished").write_bytes(left)
    (tmp_path / "out.jsonl").unlink()

    result = translate()

    assert result.exit_code == 0, result.output
    chunks = left.count(b"\n")
    assert (f"resumes after {chunks} chunks" in result.stderr) == (chunks > 0)
    assert (work / "part-00000.jsonl").read_bytes() == whole
    assert (tmp_path / "out.jsonl").read_bytes() == expected


@pytest.mark.slow
def test_another_process_resumes_after_a_kill(
    translate: Translate,
    folders: dict[Direction, Path],
    source: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.jsonl"
    many = ("--num-samples", "99")  # slow enough to be killed
    command = [sys.executable, "-m", "tools.backtranslate", folders[Direction.BACKWARD]]
    command += ["--in", source, "--out", out, "--max-new-tokens", "20", "--batch-size", "2"]
    process = subprocess.Popen([*command, "--device", "cpu", "--temp", "1.0", *many], cwd=ROOT)
    unfinished = work_folder(out) / "part-00000.unfinished"
    try:
        deadline = time.monotonic() + 60
        while not (unfinished.exists() and b"\n" in unfinished.read_bytes()):
            assert time.monotonic() < deadline
            assert process.poll() is None
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()

    result = translate(*many)

    assert "resumes after" in result.stderr
    translate(*many, out=tmp_path / "expected.jsonl")
    assert out.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_the_selection_can_be_changed_afterwards(translate: Translate, tmp_path: Path) -> None:
    translate()
    before = rows_of(tmp_path / "out.jsonl")
    minimum = sorted(row["score"] for row in before)[1]

    assert translate("--min-score", minimum).exit_code == 44
    assert rows_of(tmp_path / "out.jsonl") == before
    result = translate("--min-score", minimum, "--overwrite")

    assert "below --min-score" in result.output
    assert rows_of(tmp_path / "out.jsonl") == [row for row in before if row["score"] >= minimum]


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("messages", ExampleColumns()),
        ("prompt-completion", ExampleColumns.parse("instruction=prompt,output=completion")),
    ],
)
def test_another_form_has_the_same_examples_and_replaces_the_output_only_if_asked(
    form: str, columns: ExampleColumns, translate: Translate, expected: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "expected.jsonl"
    refused = translate("--form", form, out=out)
    assert (refused.exit_code, "--min-score or --form" in refused.output) == (44, True)
    assert out.read_bytes() == expected
    alpaca = rows_of(out)

    assert translate("--form", form, "--overwrite", out=out).exit_code == 0

    rows = rows_of(out)
    assert "instruction" not in rows[0]
    for row, known in zip(rows, alpaca, strict=True):
        assert columns.examples(row, "row") == ExampleColumns().examples(known, "row")
        assert (row["score"], row["source"]) == (known["score"], known["source"])
    assert translate("--form", "alpaca", "--overwrite", out=out).exit_code == 0
    assert out.read_bytes() == expected


def test_conflicting_inputs_are_refused_and_nothing_is_lost(
    translate: Translate, folders: dict[Direction, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--text-column", "body"), 23, "--text-column"),
        (("--forward", folders[Direction.BACKWARD]), 33, "writes backward"),
        (("--forward", tmp_path / "nowhere"), 40, "does not exist; give a run"),
        (("--task-index", 1), 2, "is not less than --tasks 1"),
    ]
    for options, exit_code, message in cases:
        result = translate(*options, out=tmp_path / f"refused-{exit_code}.jsonl")
        assert (result.exit_code, message in result.output) == (exit_code, True), result.output
        assert not work_folder(tmp_path / f"refused-{exit_code}.jsonl").exists()

    out.write_text("mine\n")
    assert translate().exit_code == 44
    assert out.read_text() == "mine\n"
    out.unlink()

    assert translate("--limit", 4).exit_code == 0
    result = translate("--limit", 5)
    assert (result.exit_code, "another --limit" in result.output) == (44, True)

    parts = ResumableChunks(work_folder(tmp_path / "two.jsonl"), 1)
    with locked(parts.lock_path(0)):
        result = translate(out=tmp_path / "two.jsonl")
    assert (result.exit_code, "another process" in result.output) == (13, True)

    (work_folder(out) / "part-00000.jsonl").write_bytes(b"[1, 2\n")
    result = translate("--limit", 4)
    assert (result.exit_code, "part-00000.jsonl:1 is corrupted" in result.output) == (74, True)


def test_tasks_may_create_the_work_folder_concurrently(tmp_path: Path) -> None:
    folder = tmp_path / "out.jsonl.work"
    folder.mkdir()
    for name in (".plan.json.0123456789ab.partial", "part-00001.lock"):
        (folder / name).touch()
    require_plan(folder, {"--seed": 1})
    require_plan(folder, {"--seed": 1})
    with pytest.raises(OutputExistsError, match="created with another --seed"):
        require_plan(folder, {"--seed": 2})
    (folder / "plan.json").unlink()
    (folder / "notes.txt").touch()
    with pytest.raises(OutputExistsError, match="already holds something"):
        require_plan(folder, {"--seed": 1})
