"""Real runs that are stopped and killed: their messages, and where they resume."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import PreemptedError, RunMismatchError, UserInterruptError
from megaback.faults.exit_record import read_history
from megaback.run_folder import complete_checkpoints
from tests.helpers.interrupting import hearing_ctrl_c
from tests.helpers.tiny_run import (
    TOTAL_STEPS,
    curve_of,
    metrics_of,
    training_environment,
    wait_for_step,
)
from tests.helpers.warm_ranks import WarmRanks
from tests.helpers.warm_start import COLD_VARIABLE
from tools.watch import health_of

pytestmark = pytest.mark.slow

Train = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
RunOf = Callable[..., Path]
SIGNALS = {"SIGTERM": (signal.SIGTERM, 20), "SIGUSR1": (signal.SIGUSR1, 50)}


@dataclass(frozen=True)
class Stop:
    """State of a run after a signal."""

    exit_code: int
    steps: int
    newest_checkpoint: str


@pytest.fixture(scope="module")
def preempted_run(
    tmp_path_factory: pytest.TempPathFactory, start_training: Start, train: Train
) -> tuple[Path, dict[str, Stop]]:
    """A run stopped by SIGTERM, resumed, stopped by SIGUSR1, resumed to its end, with wandb.

    `stopped` beside it is a copy after the first stop.
    """
    run = tmp_path_factory.mktemp("preempted") / "run"
    options = ("zero.stage=2", "logging.wandb=offline")
    stops: dict[str, Stop] = {}
    for name, (number, step) in SIGNALS.items():
        process = start_training(run, *options)
        wait_for_step(process, run, step)
        process.send_signal(number)
        exit_code = process.wait(timeout=60)
        if not stops:
            shutil.copytree(run, run.with_name("stopped"))
        newest = max(path.name for path in (run / "checkpoints").glob("step-*"))
        stops[name] = Stop(exit_code, metrics_of(run)[-1]["step"], newest)
    result = train(run, *options)
    assert result.returncode == 0, result.stderr
    return run, stops


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_a_run_with_the_code_that_means_requeue(
    name: str, preempted_run: tuple[Path, dict[str, Stop]]
) -> None:
    assert preempted_run[1][name].exit_code == PreemptedError.exit_code == 75


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_saves_the_last_step_that_was_taken(
    name: str, preempted_run: tuple[Path, dict[str, Stop]]
) -> None:
    stop = preempted_run[1][name]

    assert stop.steps < TOTAL_STEPS
    assert stop.newest_checkpoint == f"step-{stop.steps:08d}"


def test_a_run_stopped_by_signals_has_bitwise_the_metrics_of_one_that_was_not(
    preempted_run: tuple[Path, dict[str, Stop]], run_of: RunOf
) -> None:
    assert metrics_of(preempted_run[0]) == metrics_of(run_of("zero.stage=2"))


def test_a_stopped_run_resumes_with_fewer_ranks_at_another_stage(
    preempted_run: tuple[Path, dict[str, Stop]], train_one_rank: Train, run_of: RunOf
) -> None:
    run = preempted_run[0].with_name("stopped")

    result = train_one_rank(run, "zero.stage=3")

    assert result.returncode == 0, result.stderr
    assert "of 2 ranks at ZeRO stage 2 is resumed with 1 ranks at stage 3" in result.stderr
    assert curve_of(run) == pytest.approx(curve_of(run_of("zero.stage=2")), abs=1e-4)


def test_a_signal_prints_one_message(
    preempted_run: tuple[Path, dict[str, Stop]],
) -> None:
    output = (preempted_run[0] / "output.txt").read_text()

    assert output.count("megaback: error: asked to stop after") == 2
    assert "Traceback" not in output


def test_wandb_offline_keeps_one_id_across_restarts(
    preempted_run: tuple[Path, dict[str, Stop]],
) -> None:
    folders = [path.name for path in (preempted_run[0] / "wandb").glob("offline-run-*")]
    wandb_id = (preempted_run[0] / "wandb_id.txt").read_text().strip()

    assert len(folders) == 3
    assert {name.rpartition("-")[2] for name in folders} == {wandb_id}


def test_a_signal_while_ranks_are_starting_means_requeue_too(
    tmp_path: Path, start_training: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COLD_VARIABLE, "1")  # so that ranks import torch
    process = start_training(tmp_path / "run")
    give_up = time.monotonic() + 60
    while not psutil.Process(process.pid).children() and time.monotonic() < give_up:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=60) == PreemptedError.exit_code


def test_ctrl_c_while_ranks_are_starting_is_one_message(config_path: Path, tmp_path: Path) -> None:
    """While torch is imported there is nothing to save, and no traceback is printed."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "megaback", "train", config_path, f"run={run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=training_environment() | {COLD_VARIABLE: "1"},
        preexec_fn=hearing_ctrl_c,
    )
    give_up = time.monotonic() + 60
    while len(psutil.Process(process.pid).children()) < 2 and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=60)

    assert process.returncode == UserInterruptError.exit_code
    assert (output, said.count("\n")) == ("", 1), said
    assert "interrupted before the first step" in said
    assert not complete_checkpoints(run)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), f"nothing is left to do: {{run}} has done {TOTAL_STEPS} of {TOTAL_STEPS} steps"),
        (("training.steps=50",), f"has done {TOTAL_STEPS} of 50 steps"),
    ],
)
def test_starting_a_finished_run_again_changes_nothing(
    overrides: tuple[str, ...], says: str, lonely_run_of: RunOf, train_one_rank: Train
) -> None:
    run = lonely_run_of("zero.stage=1")
    before = contents_of(run)

    result = train_one_rank(run, "zero.stage=1", *overrides)

    assert result.returncode == 0
    assert says.format(run=run) in result.stdout
    assert contents_of(run) == before
    assert (health_of(run).state, health_of(run).step) == ("finished", TOTAL_STEPS)


def test_a_refused_start_changes_nothing_of_a_finished_run(
    lonely_run_of: RunOf, train: Train
) -> None:
    """Through the launcher, whose exit record is checked as well."""
    run = lonely_run_of("zero.stage=1")
    before = contents_of(run)

    result = train(run, "zero.stage=1", "hardware.processes=1", "model.width=64")

    assert result.returncode == RunMismatchError.exit_code, result.stderr
    assert contents_of(run) == before


def test_a_run_killed_after_its_last_step_is_finished_by_the_next_start(
    run_of: RunOf, tmp_path: Path, warm_ranks: Callable[[int], WarmRanks], config_path: Path
) -> None:
    run = shutil.copytree(run_of("zero.stage=1"), tmp_path / "run")
    (run / "exit.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()

    warm_ranks(2).train(config_path, (f"run={run}", "zero.stage=1"), tmp_path / "output.txt")

    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_config_changes_of_a_resume_are_printed_and_kept_in_the_history(
    lonely_run_of: RunOf, tmp_path: Path, warm_ranks: Callable[[int], WarmRanks], config_path: Path
) -> None:
    run = shutil.copytree(lonely_run_of("zero.stage=1"), tmp_path / "run")
    words = ("training.steps=101", "optimizer.learning_rate=0.001", "data.threads=0")

    warm_ranks(1).train(
        config_path, (f"run={run}", "zero.stage=1", *words), tmp_path / "output.txt"
    )

    line = (
        "changed on resume: data.threads 1 -> 0, optimizer.learning_rate 0.003 -> 0.001, "
        "training.steps 100 -> 101\n"
    )
    assert line in (tmp_path / "output.txt").read_text()
    first, second = [event for event in read_history(run) if event["event"] == "start"]
    assert "changed" not in first
    assert second["changed"] == {
        "data.threads": [1, 0],
        "optimizer.learning_rate": [0.003, 0.001],
        "training.steps": [100, 101],
    }


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, except the test's own output file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "output.txt"
    }
