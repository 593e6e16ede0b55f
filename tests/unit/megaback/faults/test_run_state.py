"""Every state of a run, as each command shows it."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from data_pipeline import errors
from data_pipeline.common.atomic import write_text
from data_pipeline.errors import MegabackError
from launcher.slurm.jobs import main as jobs
from megaback.faults.exit_record import record_event, record_exit, record_start
from megaback.faults.heartbeat import Heartbeat, write_heartbeat
from megaback.faults.run_state import ROLLBACK_EVENT, assess_run
from megaback.faults.start_fence import begin_start
from megaback.run_folder import EXIT_NAME, HEARTBEATS_FOLDER
from tests.helpers.run_config import run_config
from tools.artifacts import inspect
from tools.plot import main as plot
from tools.status import main as status
from tools.watch import main as watch

STEPS, TOTAL_STEPS = 20, 25
INTERVAL_S = 10.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was started and has taken 20 of 25 steps."""
    folder = tmp_path / "run"
    (folder / HEARTBEATS_FOLDER).mkdir(parents=True)
    write_text(folder / "config.yaml", run_config(folder).to_yaml())
    start(folder, 0)
    fields = {"learning_rate": 0.1, "loss": 2.0, "step_s": 1.0, "tokens_per_s": 256.0}
    lines = [
        {"step": step, "gradient_norm": 1.0, "tokens_seen": 256 * step, **fields}
        for step in range(1, STEPS + 1)
    ]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(run: Path, step: int) -> None:
    record_start(run, step=step, total_steps=TOTAL_STEPS, world_size=1, zero_stage=0)


def beat(
    run: Path, phase: str = "updating", age_s: float = 3, for_s: float = 4, **more: Any
) -> None:
    """Write a rank's heartbeat that is `age_s` old, of a phase that has taken `for_s`."""
    now = time.time()
    fields: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": psutil.Process().create_time(),
        "phase": phase,
        "step": STEPS + 1,
        "since": now - for_s,
        "written": now - age_s,
        "interval_s": INTERVAL_S,
        "timeout_s": 300.0,
    }
    write_heartbeat(run, Heartbeat(**{**fields, **more}))


def starting(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    beat(run, "checking the nodes", for_s=40, step=0)


def killed(run: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        started = psutil.Process(process.pid).create_time()
        process.kill()
    beat(run, pid=process.pid, pid_started=started)


def ended(code: int, kind: str, reason: str) -> Callable[[Path], None]:
    def end(run: Path) -> None:
        beat(run, exit_reason="all ranks ended together")
        record_exit(run, code, kind, reason)

    return end


def on_a_full_disk(code: int) -> Callable[[Path], None]:
    """The history has a record of the end, exit.json could not be written."""

    def end(run: Path) -> None:
        ended(code, "kind", "the reason")(run)
        (run / EXIT_NAME).unlink()

    return end


def resumed(run: Path) -> None:
    ended(0, "finished", "trained to the end")(run)
    start(run, STEPS)
    beat(run)


def rolled_back(run: Path) -> None:
    ended(0, "finished", "trained to the end")(run)
    record_event(run, ROLLBACK_EVENT, step=10, excluded=[11, 20])


def resumed_after_rollback(run: Path) -> None:
    rolled_back(run)
    start(run, 10)
    beat(run)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """State as watch and status show it, as jobs shows it, and its reason; the step of all."""

    make: Callable[[Path], None]
    state: str
    job_state: str
    says: str
    step: int | None = STEPS


def stopped(code: int, kind: str) -> Expected:
    return Expected(
        make=ended(code, kind, "the reason"),
        state="stopped",
        job_state=f"stopped ({code})",
        says="the reason",
    )


STATES = {
    "starting": Expected(
        make=starting,
        state="starting",
        job_state="starting",
        says="checking the nodes at step 0 for 40 s, heartbeat 3 s old",
        step=None,
    ),
    "training": Expected(
        make=beat,
        state="running",
        job_state="running",
        says="updating at step 21 for 4 s, heartbeat 3 s old",
    ),
    "saving": Expected(
        make=lambda run: beat(run, "saving"),
        state="running",
        job_state="running",
        says="saving at step 21 for 4 s",
    ),
    "validating for long": Expected(
        make=lambda run: beat(run, "validating", for_s=90),
        state="slow",
        job_state="slow",
        says="validating at step 21",
    ),
    "timed out": Expected(
        make=lambda run: beat(run, for_s=400),
        state="stuck",
        job_state="stuck",
        says="its timeout is 300 s",
    ),
    "an old heartbeat of another host": Expected(
        make=lambda run: beat(run, age_s=60, for_s=61, host="elsewhere"),
        state="dead",
        job_state="dead",
        says="has written no heartbeat for 60 s",
    ),
    "a heartbeat in the future": Expected(
        make=lambda run: beat(run, age_s=-30, for_s=-29, host="elsewhere"),
        state="running",
        job_state="running",
        says="for 0 s, heartbeat 30 s in the future: the clock of elsewhere is ahead",
    ),
    "killed": Expected(
        make=killed,
        state="dead",
        job_state="dead",
        says="is dead; its last heartbeat was at step 21",
    ),
    "finished": Expected(
        make=ended(0, "finished", "trained to the end"),
        state="finished",
        job_state="finished",
        says="trained to the end",
    ),
    "a full disk": Expected(
        make=on_a_full_disk(74), state="stopped", job_state="stopped (74)", says="the reason"
    ),
    "a terminal that closed": Expected(
        make=on_a_full_disk(75), state="stopped", job_state="stopped (75)", says="the reason"
    ),
    "finished on a full disk": Expected(
        make=on_a_full_disk(0), state="finished", job_state="finished", says="the reason"
    ),
    "resumed after its end": Expected(
        make=resumed, state="running", job_state="running", says="heartbeat 3 s old"
    ),
    "rolled back": Expected(
        make=rolled_back,
        state="stopped",
        job_state="rolled back",
        says="rolled back to step 10",
        step=10,
    ),
    "resumed after a rollback": Expected(
        make=resumed_after_rollback, state="running", job_state="running", says="heartbeat 3 s old"
    ),
    **{
        f"ended with {kind.exit_code}": stopped(kind.exit_code, name)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, MegabackError)
    },
}


def printed(command: Any, *words: object) -> str:
    return CliRunner().invoke(command, list(map(str, words))).stdout


@pytest.mark.parametrize("name", STATES)
def test_all_commands_show_the_same_state(name: str, run: Path) -> None:
    expected = STATES[name]
    expected.make(run)

    watched = json.loads(printed(watch, run, "--json"))
    assert (watched["state"], expected.says in watched["reason"]) == (expected.state, True), watched
    if watched["state"] in ("finished", "stopped"):
        assert watched["step"] == expected.step
    shown = json.loads(printed(status, run, "--json"))
    assert (shown["health"]["state"], shown["step"]) == (expected.state, expected.step or 0)
    assert f"{expected.state}: " in printed(status, run)
    row = json.loads(printed(jobs, run, "--json"))
    assert (row["state"], row["step"]) == (expected.job_state, expected.step)
    if expected.job_state not in ("running", "finished"):
        assert expected.says in row["why"], row
    facts = inspect(run, verify=False).facts
    assert expected.says in facts["ended"]
    assert ("not yet" in facts["ended"]) == (expected.state not in ("finished", "stopped"))
    assert facts.get("step") == expected.step


def test_a_rolled_back_run_can_be_plotted(run: Path, tmp_path: Path) -> None:
    rolled_back(run)

    assert printed(plot, run, "--out", tmp_path / "curves").count("curves") == 2


def test_records_of_an_older_start_that_lives_on_are_ignored(run: Path) -> None:
    older, newer = (begin_start(run) for _ in range(2))
    record_start(run, start=newer.id, step=0)
    beat(run, start=newer.id)
    record_exit(run, 51, "RankLostError", "rank 0 is dead", 1, older.id)
    beat(run, rank=1, world_size=2, start=older.id)

    assert assess_run(run, [1.0], time.time()).state == "running"
