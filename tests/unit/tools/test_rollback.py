"""`megaback rollback`: checkpoints, skipped steps, copies, kills and errors."""

import fcntl
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    LaunchError,
    StorageError,
)
from megaback.checkpoints.checkpoint import newest_checkpoint, read_meta, verify_files
from megaback.checkpoints.remote_copy import CopyTarget
from megaback.distributed.world import World
from megaback.faults.step_guard import read_excluded_steps
from megaback.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_COPY_NAME,
    LOCK_NAME,
    META_NAME,
    METRICS_NAME,
    SKIPPED_STEPS_NAME,
    complete_checkpoints,
)
from tests.helpers.run_config import run_config
from tools.rollback import roll_back

Save = Callable[..., Path]
LAST = 35
ASIDE = f"rolled-back-from-{LAST:08d}"


def write_steps(run: Path, last: int) -> None:
    lines = [{"step": step, "loss": 5.0, "gradient_norm": 1.0} for step in range(1, last + 1)]
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path, save: Save) -> Path:
    """A run at step 35, with checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    write_steps(tmp_path, LAST)
    return tmp_path


def files_of(run: Path) -> dict[Path, bytes]:
    """Contents of all files but the lock."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.name != LOCK_NAME)
    return {path: path.read_bytes() for path in paths}


@pytest.fixture
def untouched(run: Path) -> Iterator[None]:
    """Check that the test does not change the run."""
    before = files_of(run)
    yield
    assert files_of(run) == before


def steps_of(run: Path) -> list[int]:
    return [read_meta(target).step for target in complete_checkpoints(run)]


@pytest.mark.parametrize(
    ("steps", "step"), [(1, 30), (5, 30), (6, 20), (15, 20), (16, 10), (25, 10)]
)
def test_a_run_is_rolled_back_by_at_least_the_given_steps(
    steps: int, step: int, run: Path, world: World
) -> None:
    target, first, last = roll_back(run, steps)

    assert (target.name, first, last) == (f"step-{step:08d}", step + 1, LAST)
    assert newest_checkpoint(run, world) == (target, read_meta(target))


def test_the_steps_since_the_checkpoint_are_excluded(run: Path) -> None:
    roll_back(run, 10)

    assert json.loads((run / SKIPPED_STEPS_NAME).read_text()) == [[21, LAST]]


@pytest.mark.parametrize(("steps", "newer"), [(1, []), (6, [30]), (25, [20, 30])])
def test_newer_checkpoints_are_moved_aside_intact(steps: int, newer: list[int], run: Path) -> None:
    roll_back(run, steps)

    aside = sorted((run / CHECKPOINTS_FOLDER / ASIDE).iterdir())
    assert [path.name for path in aside] == [f"step-{step:08d}" for step in newer]
    assert [*steps_of(run), *newer] == [10, 20, 30]
    for target in aside:
        verify_files(target, read_meta(target))


def test_checkpoints_moved_aside_survive_rotation(run: Path, save: Save) -> None:
    roll_back(run, 25)
    aside = run / CHECKPOINTS_FOLDER / ASIDE
    before = files_of(aside)
    for step in (40, 50, 60):
        save(run, step, keep_last=2)

    assert steps_of(run) == [50, 60]
    assert files_of(aside) == before


def test_rolling_back_twice_changes_nothing_more(run: Path) -> None:
    once = roll_back(run, 10)
    checkpoints = steps_of(run)

    assert roll_back(run, 10) == once
    assert steps_of(run) == checkpoints
    assert read_excluded_steps(run) == [(21, LAST)]


def test_the_same_command_completes_a_rollback_that_was_killed(run: Path) -> None:
    (run / SKIPPED_STEPS_NAME).write_text("[[21, 35]]")
    (run / CHECKPOINTS_FOLDER / ASIDE).mkdir()

    roll_back(run, 10)

    assert (steps_of(run), read_excluded_steps(run)) == ([10, 20], [(21, LAST)])
    again = run / CHECKPOINTS_FOLDER / f"{ASIDE}-again"
    assert [path.name for path in again.iterdir()] == ["step-00000030"]


def test_a_resumed_run_can_be_rolled_back_again(run: Path, save: Save) -> None:
    roll_back(run, 10)
    save(run, 40)
    write_steps(run, 44)

    assert roll_back(run, 10)[1:] == (21, 44)
    assert read_excluded_steps(run) == [(21, LAST), (21, 44)]
    assert steps_of(run) == [10, 20]


@pytest.mark.usefixtures("untouched")
def test_without_an_early_enough_checkpoint_nothing_changes(run: Path) -> None:
    with pytest.raises(CheckpointMissingError, match=r"at step 35.* step 10: .* at most 25 steps"):
        roll_back(run, 26)


def test_a_folder_without_metrics_or_checkpoints_is_refused(run: Path) -> None:
    (run / METRICS_NAME).unlink()
    for folder in (run, run / "nowhere", run / CHECKPOINTS_FOLDER):
        with pytest.raises(CheckpointMissingError, match="is not a run with a complete checkpoint"):
            roll_back(folder, 1)


def test_an_incomplete_checkpoint_is_not_a_target(run: Path) -> None:
    (run / CHECKPOINTS_FOLDER / "step-00000020" / META_NAME).unlink()

    assert roll_back(run, 10)[0].name == "step-00000010"


@pytest.mark.usefixtures("untouched")
def test_nothing_changes_if_copies_cannot_be_rolled_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tools.rollback._copy_target", lambda run: CopyTarget("/proc/no/such/place", run)
    )
    monkeypatch.setattr(CopyTarget, "_names", lambda _: ["step-00000030"])

    with pytest.raises(StorageError, match="the run was not changed"):
        roll_back(run, 10)


def test_copies_are_rolled_back_with_the_run(
    run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("copies")
    shutil.copytree(run / CHECKPOINTS_FOLDER, place / run.name)
    config = run_config(run, checkpoint={"copy_to": str(place)})
    (run / CONFIG_COPY_NAME).write_text(config.to_yaml())

    roll_back(run, 10)

    assert CopyTarget(str(place), run).complete() == ["step-00000010", "step-00000020"]
    copied = place / run.name / SKIPPED_STEPS_NAME
    assert copied.read_bytes() == (run / SKIPPED_STEPS_NAME).read_bytes()


@pytest.mark.usefixtures("untouched")
def test_a_run_that_is_training_is_refused(run: Path) -> None:
    with (run / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

        with pytest.raises(LaunchError, match="is training; stop it first"):
            roll_back(run, 1)


def test_a_rollback_releases_the_lock(run: Path) -> None:
    roll_back(run, 1)

    with (run / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_corrupted_target_is_refused_and_nothing_changes(run: Path) -> None:
    weights = run / CHECKPOINTS_FOLDER / "step-00000020" / "weights-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = files_of(run)

    with pytest.raises(CheckpointCorruptError, match=r"weights-00000\.safetensors is not"):
        roll_back(run, 10)
    assert files_of(run) == before


def test_the_command_prints_the_checkpoint_and_the_skipped_steps(
    run: Path, run_megaback: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    done = run_megaback("rollback", run, "--steps", 10)

    assert done.returncode == 0, done.stderr
    assert "resumes from step-00000020, and skips steps 21 to 35" in done.stdout
