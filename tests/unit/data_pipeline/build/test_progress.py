"""Build progress: sums over processes, JSON lines, and a bar on a terminal."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.build import progress
from data_pipeline.build.plan_command import claim_plan
from data_pipeline.build.progress import SharedCounts, showing_progress
from data_pipeline.build.task import run_task
from data_pipeline.common.process_pool import run_in_processes, shared_by_all
from tests.helpers.builds import Codecs, build_here, make_settings

FIELDS = {"documents", "text_bytes", "tokens", "input_bytes"}


def _count(index: int) -> int:
    SharedCounts.of_task(shared_by_all(), index)[:] += (index, 10 * index, 100, 1)
    return os.getpid()


def test_counts_are_summed_over_processes() -> None:
    counts = SharedCounts(4)
    calls = [(index,) for index in range(4)]
    pids = {pid for _, pid in run_in_processes(_count, calls, 2, counts.raw)}
    assert os.getpid() not in pids
    assert counts.total() == {
        "documents": 6,
        "text_bytes": 60,
        "tokens": 400,
        "input_bytes": 4,
    }


def test_a_task_that_begins_again_counts_once(source: Path, codec: Codecs, tmp_path: Path) -> None:
    plan, _ = claim_plan(make_settings(source, codec()), codec(), tmp_path / "out", 1)
    counts = SharedCounts(1)
    row = SharedCounts.of_task(counts.raw, 0)
    run_task(plan.tasks[0], tmp_path / "out", codec().model_bytes, row)
    once = counts.total()
    run_task(plan.tasks[0], tmp_path / "out", codec().model_bytes, row)
    assert counts.total() == once


def test_a_task_has_counted_all_its_input_at_its_end(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    plan, _ = claim_plan(make_settings(source, codec()), codec(), tmp_path / "out", 1)
    counts = SharedCounts(1)
    row = SharedCounts.of_task(counts.raw, 0)
    run_task(plan.tasks[0], tmp_path / "out", codec().model_bytes, row)
    assert counts.total()["input_bytes"] == plan.input_bytes


@pytest.fixture
def lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, object]]:
    """Progress lines at half of some work, without a terminal."""
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.02)
    counts = SharedCounts(2)
    SharedCounts.of_task(counts.raw, 1)[:] = (50, 5_000_000, 1_000_000, 500)
    with showing_progress(counts, input_bytes=1000):
        time.sleep(0.2)
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_without_a_terminal_progress_is_lines_of_json(lines: list[dict[str, object]]) -> None:
    assert len(lines) >= 2
    assert {line["event"] for line in lines} == {"build"}


def test_a_line_has_the_counts(lines: list[dict[str, object]]) -> None:
    assert {name: lines[-1][name] for name in FIELDS} == {
        "documents": 50,
        "text_bytes": 5_000_000,
        "tokens": 1_000_000,
        "input_bytes": 500,
    }


def test_the_rates_of_a_line_agree_with_its_counts(lines: list[dict[str, object]]) -> None:
    line = lines[-1]
    ratio = line["tokens_per_s"] / line["documents_per_s"]
    assert ratio == pytest.approx(20_000, rel=0.01)
    assert line["text_mb_per_s"] / line["documents_per_s"] == pytest.approx(0.1, rel=0.01)


def test_a_line_has_the_time_left(lines: list[dict[str, object]]) -> None:
    line = lines[-1]
    assert line["left_s"] == pytest.approx(line["elapsed_s"], abs=1)


def test_the_time_left_is_null_before_any_input_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.02)
    with showing_progress(SharedCounts(1), input_bytes=1000):
        time.sleep(0.1)
    line = json.loads(capsys.readouterr().err.splitlines()[0])
    assert line["left_s"] is None


def test_a_short_build_prints_nothing_on_stderr(
    source: Path, codec: Codecs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_here(make_settings(source, codec()), codec(), tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_an_error_stops_the_progress_display(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.02)
    with pytest.raises(ValueError, match="broken"), showing_progress(SharedCounts(1), 1):
        raise ValueError("broken")
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


BAR_SCRIPT = """
import time
from data_pipeline.build import progress
from data_pipeline.build.plan_command import claim_plan
progress._BAR_INTERVAL_S = 0.05
counts = progress.SharedCounts(1)
row = progress.SharedCounts.of_task(counts.raw, 0)
with progress.showing_progress(counts, 1000):
    for _ in range(6):
        row += (100, 1_000_000, 200_000, 100)
        time.sleep(0.1)
"""


def test_on_a_terminal_a_bar_shows_rates_and_time_left() -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "24"}
    with subprocess.Popen(
        [sys.executable, "-c", BAR_SCRIPT], stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        while block := _read(leader):
            shown += block
    os.close(leader)
    assert process.returncode == 0
    text = shown.decode()
    wanted = ["documents", "MB/s", "M tokens/s", "left", "%"]
    assert [word for word in wanted if word not in text] == []


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end was closed
        return b""
