"""Horizons of one run: each branch is bit for bit the run that was planned for it alone."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher.train
from launcher.train import train_with_branches
from megaback.branches import branches_of, recorded_branch_point
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.run_folder import EXIT_NAME, complete_checkpoints, step_of
from tests.helpers.tiny_run import curve_of, training_environment, val_losses_of, wait_for_step
from tests.helpers.warm_ranks import WarmRanks

pytestmark = pytest.mark.slow

RunOf = Callable[..., Path]
SHORT = (
    "optimizer.schedule=wsd",
    "optimizer.decay_fraction=0.25",
    "optimizer.warmup_steps=4",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=2",
    "validation.every_steps=8",
    "guard.spike_nats=5",
    "guard.window_steps=3",
)
HORIZONS = ("training.steps=null", "optimizer.decay_at=[5120, 8192, 12288]")
STEPS = {"5.12e3": 10, "8.192e3": 16, "1.2288e4": 24}
"""Steps at each horizon, of 8 rows of 64 tokens."""


@pytest.fixture(scope="module")
def run(
    config_path: Path,
    warm_ranks: Callable[[int], WarmRanks],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run of three horizons with its branches, on two ranks."""
    run = tmp_path_factory.mktemp("horizons") / "run"

    def train(config: Path, overrides: tuple[str, ...], *_: object) -> int:
        warm_ranks(2).train(config, overrides, run.parent / "output.txt")
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.train, "train", train)
        assert train_with_branches(config_path, (f"run={run}", *SHORT, *HORIZONS))[0] == 0
    return run


@pytest.mark.parametrize("name", STEPS)
def test_a_branch_is_the_run_that_was_planned_for_its_horizon_alone(
    name: str, run: Path, run_of: RunOf
) -> None:
    branch = run / "branches" / name
    alone = run_of(*SHORT, f"training.steps={STEPS[name]}")

    _, ours = find_checkpoint(branch)
    _, theirs = find_checkpoint(alone)

    assert ours.step == STEPS[name]
    assert ours.files == theirs.files
    assert curve_of(branch) == curve_of(alone)[-len(curve_of(branch)) :]
    assert val_losses_of(branch)[ours.step] == val_losses_of(alone)[ours.step]


def test_the_trunk_stays_at_the_peak_and_keeps_the_checkpoints_of_its_branches(run: Path) -> None:
    assert set(curve_of(run, "learning_rate")[4:]) == {3e-3}
    assert [step_of(path) for path in complete_checkpoints(run)] == [8, 12, 16, 18]
    points = [recorded_branch_point(path) for path in branches_of(run)]
    assert [point.trunk_step for point in points if point is not None] == [8, 12, 18]


def test_the_same_command_resumes_a_branch_that_was_killed(
    run: Path,
    run_of: RunOf,
    config_path: Path,
    train: Callable[..., "subprocess.CompletedProcess[str]"],
    tmp_path: Path,
) -> None:
    last = run / "branches" / "1.2288e4"
    shutil.rmtree(last)
    command = [sys.executable, "-m", "megaback", "train", config_path, f"run={run}"]
    process = subprocess.Popen(
        [*command, *SHORT, *HORIZONS],
        stdout=(tmp_path / "output.txt").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env=training_environment(),
        start_new_session=True,
    )
    wait_for_step(process, last, 3 + 2, tmp_path / "output.txt")  # after 3 lines of the trunk
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (last / EXIT_NAME).exists()
    assert step_of(complete_checkpoints(last)[-1]) < 24

    resumed = train(run, *SHORT, *HORIZONS)

    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("it has done its") == 3
    assert "resuming from step" in resumed.stdout
    alone = run_of(*SHORT, "training.steps=24")
    assert find_checkpoint(last)[1].files == find_checkpoint(alone)[1].files
