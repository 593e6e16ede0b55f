"""`megaback watch` tells well from slow, stuck, dead, stopped and finished."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_heartbeat import NOW, beat

from data_pipeline.errors import CheckpointMissingError
from megaback.exit_record import record_exit, record_start
from megaback.heartbeat import HEARTBEATS_FOLDER, Heartbeat, write_heartbeat
from megaback.metrics import METRICS_NAME
from tools.watch import look


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was started."""
    record_start(tmp_path, step=0)
    (tmp_path / HEARTBEATS_FOLDER).mkdir()
    return tmp_path


def state_of(run: Path, *beats: Heartbeat, step_times: tuple[float, ...] = (1.0,) * 9) -> str:
    """What the run is said to be, and why."""
    for one in beats or (beat(0), beat(1)):
        write_heartbeat(run, one)
    lines = [
        json.dumps({"step": number, "step_s": time_s}) for number, time_s in enumerate(step_times)
    ]
    (run / METRICS_NAME).write_text("\n".join(lines))
    health = look(run, NOW)
    return f"{health.state}: {health.reason}"


def test_a_run_is_well(run: Path) -> None:
    assert state_of(run).startswith("running: 2 ranks")


def test_a_run_without_a_step_is_starting(run: Path) -> None:
    assert state_of(run, step_times=()).startswith("starting: rank")


def test_a_run_that_ended_is_finished_or_stopped_with_its_reason(run: Path) -> None:
    record_exit(run, 0, "finished", "trained to the end")
    assert state_of(run).startswith("finished: exit code 0")
    (run / "exit.json").unlink()
    record_exit(run, 75, "PreemptedError", "asked to stop")
    assert "stopped: exit code 75 (PreemptedError): asked to stop" in state_of(run)


def test_a_step_that_takes_long_is_slow_and_the_rank_that_it_waits_for_is_named(run: Path) -> None:
    late = beat(1, step=6, since=NOW - 40)

    assert "slow: rank 1 (elsewhere, process 1) is updating at step 6, for 40 s" in state_of(
        run, beat(0), late
    )


def test_slow_steps_are_slow(run: Path) -> None:
    assert state_of(run, step_times=(1.0, 1.0, 1.0, 9.0)).startswith(
        "slow: the last step took 9.00"
    )


def test_longer_than_allowed_is_stuck(run: Path) -> None:
    assert state_of(run, beat(0, since=NOW - 301), beat(1)).startswith("stuck: rank 0")


def test_a_silent_rank_makes_a_run_dead(run: Path) -> None:
    silent = replace(beat(1), written=NOW - 100)

    assert state_of(run, beat(0), silent).startswith("dead: rank 1")


def test_restarts_are_counted(run: Path) -> None:
    record_start(run, step=20)
    state_of(run)

    assert look(run, NOW).restarts == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="holds no run"):
        look(tmp_path)
