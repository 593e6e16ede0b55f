"""Real runs that are stopped and killed: what they say, and where they go on."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny_run import TOTAL_STEPS, metrics_of, wait_for_step

from data_pipeline.errors import PreemptedError

pytestmark = pytest.mark.slow

Train = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
RunOf = Callable[..., Path]
SIGNALS = {"SIGTERM": (signal.SIGTERM, 20), "SIGUSR1": (signal.SIGUSR1, 50)}


@dataclass(frozen=True)
class Stop:
    """What a run was like after a signal."""

    exit_code: int
    steps: int
    newest_checkpoint: str


@pytest.fixture(scope="module")
def preempted_run(
    tmp_path_factory: pytest.TempPathFactory, start_training: Start, train: Train
) -> tuple[Path, dict[str, Stop]]:
    """A run stopped by SIGTERM, resumed, stopped by SIGUSR1, resumed to its end, with wandb."""
    run = tmp_path_factory.mktemp("preempted") / "run"
    options = ("zero.stage=2", "logging.wandb=offline")
    stops: dict[str, Stop] = {}
    for name, (number, step) in SIGNALS.items():
        process = start_training(run, *options)
        wait_for_step(process, run, step)
        process.send_signal(number)
        exit_code = process.wait(timeout=60)
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


def test_a_signal_is_answered_with_one_sentence(
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
    tmp_path: Path, start_training: Start
) -> None:
    process = start_training(tmp_path / "run")
    give_up = time.monotonic() + 60
    while not psutil.Process(process.pid).children() and time.monotonic() < give_up:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=60) == PreemptedError.exit_code


def test_a_finished_run_that_is_started_again_changes_nothing(
    lonely_run_of: RunOf, train_one_rank: Train
) -> None:
    run = lonely_run_of("zero.stage=1")
    before = (run / "metrics.jsonl").read_bytes()

    assert train_one_rank(run, "zero.stage=1").returncode == 0

    assert (run / "metrics.jsonl").read_bytes() == before
