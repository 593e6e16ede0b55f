"""`megaback watch`: states of a run, from the heartbeats and metrics in its folder."""

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.errors import CheckpointMissingError
from megaback.faults.exit_record import record_exit, record_start
from megaback.faults.heartbeat import Heartbeat, write_heartbeat
from megaback.run_folder import HEARTBEATS_FOLDER, METRICS_NAME
from tools.watch import EXIT_CODES, Health, health_of

Beat = Callable[..., None]
NOW = 1_000_000.0
STEP_S = 2.0
INTERVAL_S = 5.0
TIMEOUT_S = 60.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was started once."""
    record_start(tmp_path, step=0, world_size=2)
    (tmp_path / HEARTBEATS_FOLDER).mkdir()
    return tmp_path


@pytest.fixture
def beat(run: Path) -> Beat:
    """`beat(rank, for_s, **fields)`: writes a 1 s old heartbeat; its phase began `for_s` ago."""

    def write(rank: int, for_s: float = 1.0, **fields: Any) -> None:
        usual: dict[str, Any] = {
            "rank": rank,
            "world_size": 2,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_started": psutil.Process().create_time(),
            "phase": "updating",
            "step": 20,
            "since": NOW - for_s,
            "written": NOW - 1,
            "interval_s": INTERVAL_S,
            "timeout_s": TIMEOUT_S,
        }
        write_heartbeat(run, Heartbeat(**{**usual, **fields}))

    return write


def write_steps(run: Path, *seconds: float) -> None:
    """Write steps of these durations, followed by a validation and an excluded step."""
    lines = [{"step": step, "step_s": taken_s} for step, taken_s in enumerate(seconds, 1)]
    others = [{"step": len(lines), "val_loss": 5.0}, {"step": len(lines) + 1, "excluded": True}]
    path = run / METRICS_NAME
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *others]))


def usual_steps(run: Path) -> None:
    write_steps(run, *[STEP_S] * 19)


def assert_is(state: str, reason: str, run: Path) -> Health:
    health = health_of(run, NOW)
    assert (health.state, reason in health.reason) == (state, True), health
    return health


def test_a_run_that_trained_to_the_end_is_finished(run: Path, beat: Beat) -> None:
    beat(0, exit_reason="trained to the end")
    record_exit(run, 0, "finished", "trained to the end")

    assert_is("finished", "exit code 0 (finished): trained to the end", run)


def test_a_run_that_ended_with_a_reason_is_stopped(run: Path, beat: Beat) -> None:
    beat(0, exit_reason="all ranks ended together")
    record_exit(run, 75, "PreemptedError", "asked to stop after 20 steps")

    assert_is("stopped", "exit code 75 (PreemptedError): asked to stop after 20 steps", run)


def test_before_the_first_step_a_run_is_starting(run: Path, beat: Beat) -> None:
    beat(0, step=0, phase="starting", for_s=30)
    beat(1, step=0, phase="starting", for_s=10)

    health = assert_is("starting", "starting at step 0 for 30 s, heartbeat 1 s old", run)

    assert (health.step, health.median_step_s) == (0, None)


def test_a_run_that_makes_steps_is_running(run: Path, beat: Beat) -> None:
    beat(0)
    beat(1, step=21)
    usual_steps(run)

    health = assert_is("running", "2 ranks; rank 0", run)

    assert (health.step, health.median_step_s, health.ranks, health.restarts) == (21, STEP_S, 2, 0)


def test_a_run_whose_last_step_took_long_is_slow(run: Path, beat: Beat) -> None:
    beat(0)
    beat(1)
    write_steps(run, *[STEP_S] * 19, 3 * STEP_S)
    assert_is("running", "2 ranks", run)
    write_steps(run, *[STEP_S] * 19, 3 * STEP_S + 0.1)

    assert_is("slow", "the last step took 6.10 s, the median step 2.00 s", run)


def test_a_run_that_waits_for_a_rank_is_slow(run: Path, beat: Beat) -> None:
    beat(0, for_s=3)
    beat(1, for_s=11, phase="reading its rows")
    usual_steps(run)

    assert_is(
        "slow",
        "reading its rows at step 20 for 11 s, heartbeat 1 s old; the median step takes 2.00 s",
        run,
    )


@pytest.mark.parametrize(("for_s", "state"), [(10, "running"), (11, "slow")])
def test_a_phase_shorter_than_two_heartbeats_is_not_slow(
    for_s: float, state: str, run: Path, beat: Beat
) -> None:
    for rank in range(2):
        beat(rank, for_s)
    write_steps(run, *[0.1] * 19)

    assert_is(state, "updating at step 20 for", run)


def test_a_phase_that_exceeds_its_timeout_is_stuck(run: Path, beat: Beat) -> None:
    beat(0, for_s=62)
    beat(1, for_s=64, phase="saving")
    usual_steps(run)

    assert_is("stuck", "saving at step 20 for 64 s, heartbeat 1 s old; its timeout is 60 s", run)


def test_the_rank_at_the_earliest_step_is_waited_for(run: Path, beat: Beat) -> None:
    """The rank that is ahead has waited longer."""
    beat(0, step=21, for_s=50)
    beat(1, step=20, for_s=1)
    usual_steps(run)

    assert_is("running", "rank 1", run)


def test_a_run_that_never_took_a_step_can_be_stuck(run: Path, beat: Beat) -> None:
    for rank in range(2):
        beat(rank, for_s=61, step=0, phase="starting")

    assert_is("stuck", "starting at step 0", run)


def test_a_run_with_an_ended_process_is_dead(run: Path, beat: Beat) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        started = psutil.Process(process.pid).create_time()
        process.kill()
    beat(0)
    beat(1, pid=process.pid, pid_started=started)
    usual_steps(run)

    assert_is("dead", f"process {process.pid}) is dead; its last heartbeat was at step 20", run)


def test_a_run_with_an_overdue_heartbeat_is_dead(run: Path, beat: Beat) -> None:
    beat(0)
    beat(1, host="elsewhere", written=NOW - 13)
    usual_steps(run)

    assert_is("dead", "rank 1 (elsewhere, process", run)


def test_a_run_with_a_missing_heartbeat_is_dead(run: Path, beat: Beat) -> None:
    assert_is("dead", "rank 0 has written no heartbeat", run)
    beat(0)

    assert_is("dead", "rank 1 has written no heartbeat", run)


def test_a_run_whose_ranks_exited_without_a_record_is_dead(run: Path, beat: Beat) -> None:
    """The disk may have been full."""
    for rank in range(2):
        beat(rank, exit_reason="a full disk")

    assert_is("dead", "ended: a full disk", run)


def test_at_most_four_missing_ranks_are_named(run: Path, beat: Beat) -> None:
    beat(0, world_size=100)

    assert health_of(run, NOW).reason.count("no heartbeat") == 4


def test_every_start_but_the_first_is_a_restart(run: Path, beat: Beat) -> None:
    for _ in range(2):
        record_exit(run, 51, "RankLostError", "rank 1 is dead")
        record_start(run, step=20, world_size=2)
    for rank in range(2):
        beat(rank)
    usual_steps(run)

    assert assert_is("running", "2 ranks", run).restarts == 2


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_a_folder_that_holds_no_run_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match=r"is not a run.s folder \(no history.jsonl\)"):
        health_of(tmp_path / name)


@pytest.mark.parametrize(("number", "more"), [(1, ""), (8, " and 2 more")])
def test_runs_below_a_folder_are_suggested(number: int, more: str, tmp_path: Path) -> None:
    for name in map(str, range(number)):
        (tmp_path / name).mkdir()
        record_start(tmp_path / name, step=0)
    with pytest.raises(CheckpointMissingError, match=f"give one of {tmp_path}/0.*{more}$") as found:
        health_of(tmp_path)
    assert str(found.value).count(f"{tmp_path}/") == min(number, 6)


def test_the_command_exits_with_the_code_of_the_state(
    run: Path, run_megaback: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = run_megaback("watch", run, "--json", "--every", "0.1")

    assert done.returncode == EXIT_CODES["dead"] == 6
    assert json.loads(done.stdout)["state"] == "dead"


@pytest.mark.parametrize(
    ("slowest", "lag_s", "named"),
    [
        ([3, 3, 1, 3, 3, 2], 0.1, "rank 3 is the slowest in 4 of 6 steps"),
        ([3, 3, 1, 3, 3, 2], 0.01, None),  # of passes of 0.5 s
        ([1, 2, 3, 1, 2, 3], 0.1, None),
        ([3, 3, 3], 0.1, None),
    ],
)
def test_the_rank_that_is_the_slowest_in_most_steps_is_named(
    run: Path, beat: Beat, slowest: list[int], lag_s: float, named: str | None
) -> None:
    fields = {"step_s": STEP_S, "slowest_forward_s": 0.5, "forward_lag_s": lag_s}
    lines: list[dict[str, object]] = [{"step": 1, "step_s": STEP_S}]
    lines += [{"step": n, "slowest_rank": rank, **fields} for n, rank in enumerate(slowest, 2)]
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    beat(0)
    beat(1)

    said = health_of(run, NOW).slow_rank

    assert (said or "").partition(":")[0] == (named or "")
    if said:
        assert said.endswith("take 0.500 s, 0.100 s longer than the fastest rank's")
