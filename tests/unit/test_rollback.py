"""A run is set back to before bad data; what came after is kept aside, and its data left out."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import CheckpointMissingError, LaunchError
from megaback.checkpoint import complete_checkpoints
from megaback.guard import read_left_out
from tools.rollback import roll_back


@pytest.fixture
def run(tmp_path: Path, save: Callable[..., Path]) -> Path:
    """A run at step 35, with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 36)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize(("steps", "goes_on"), [(1, 30), (5, 30), (6, 20), (15, 20), (25, 10)])
def test_a_run_goes_back_at_least_as_far_as_asked(steps: int, goes_on: int, run: Path) -> None:
    target, first, last = roll_back(run, steps)

    assert target.name == f"step-{goes_on:08d}"
    assert (first, last) == (goes_on + 1, 35)
    assert read_left_out(run) == [(goes_on + 1, 35)]
    assert complete_checkpoints(run)[-1] == target


def test_newer_checkpoints_are_kept_aside(run: Path) -> None:
    roll_back(run, 20)

    aside = run / "checkpoints" / "rolled-back-from-00000035"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000020", "step-00000030"]


def test_further_than_the_oldest_checkpoint_is_refused_and_changes_nothing(run: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="at most 25 steps"):
        roll_back(run, 26)

    assert len(complete_checkpoints(run)) == 3
    assert read_left_out(run) == []


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="no run"):
        roll_back(tmp_path, 1)


def test_a_run_that_is_training_is_refused(run: Path) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(LaunchError, match="is training"):
            roll_back(run, 5)
