"""A real run whose folder is moved while it trains, and another run's put in its place."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import PreemptedError, RankLostError
from megaback.faults.exit_record import read_exit, read_history, record_start
from megaback.run_folder import METRICS_NAME, complete_checkpoints
from tests.helpers.tiny_run import wait_for_step
from tests.integration.faults.actions import signal_rank

pytestmark = pytest.mark.slow

Start = Callable[..., "subprocess.Popen[str]"]
ENDLESS = (
    *("hardware.preflight=off", "hardware.heartbeat_s=0.5"),
    *("training.steps=100000", "checkpoint.every_steps=null", "validation.every_steps=null"),
)


def wait_for_more(process: "subprocess.Popen[str]", metrics: Path) -> None:
    """Return once a run has taken more steps, wherever its folder is."""
    before = metrics.read_bytes().count(b"\n")
    give_up = time.monotonic() + 60
    while metrics.read_bytes().count(b"\n") < before + 5:
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_run_whose_folder_is_moved_saves_there_and_nothing_into_the_run_in_its_place(
    tmp_path: Path, start_training: Start
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    process = start_training(run, *ENDLESS, "hardware.processes=1")
    wait_for_step(process, run, 3)
    run.rename(moved)
    run.mkdir()
    record_start(run, step=0)  # the first files that another start writes
    before = read_history(run)
    wait_for_more(process, moved / METRICS_NAME)
    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=60) == PreemptedError.exit_code
    assert len(complete_checkpoints(moved)) == 1
    ending = read_exit(moved)
    assert ending is not None
    assert ending["code"] == PreemptedError.exit_code
    assert f"run={moved}" in (moved / "output.txt").read_text()
    assert [path.name for path in run.iterdir()] == ["history.jsonl"]
    assert read_history(run) == before


def test_a_rank_that_is_lost_after_a_move_is_named_in_the_moved_folder(
    tmp_path: Path, start_training: Start
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    process = start_training(run, *ENDLESS, "hardware.processes=2")
    wait_for_step(process, run, 3)
    run.rename(moved)
    wait_for_more(process, moved / METRICS_NAME)
    signal_rank(signal.SIGKILL, 1)(process, moved)

    assert process.wait(timeout=60) == RankLostError.exit_code
    ending = read_exit(moved)
    assert ending is not None
    assert ending["code"] == RankLostError.exit_code
    assert ending["rank"] == 0
    assert "rank 1 " in ending["reason"]
    assert "is dead" in ending["reason"]
    assert f"run={moved} to resume" in (moved / "output.txt").read_text()
    assert not run.exists()
