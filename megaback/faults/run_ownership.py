"""Ownership of a run's folder: megaback made it, or it is empty; others are not touched.

A folder belongs to a run if it has a history of starts, or the snapshot of a submission. Loads no
torch: the launcher checks before any rank starts, and the ranks check again.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import yaml

from data_pipeline.common.checked_json import read_json
from data_pipeline.common.output_paths import require_apart
from data_pipeline.common.regular_files import require_no_link
from data_pipeline.errors import OutputExistsError
from megaback.config import Config
from megaback.faults.exit_record import read_history
from megaback.faults.run_lock import lock_holder
from megaback.faults.start_fence import read_start
from megaback.run_folder import (
    BASE_FOLDER,
    CHECKPOINTS_FOLDER,
    CONFIG_COPY_NAME,
    CONVERTED_FOLDER,
    FETCHED_NAME,
    HEARTBEAT_PREFIX,
    HEARTBEATS_FOLDER,
    HISTORY_NAME,
    LOCK_NAME,
    LOGS_FOLDER,
    PREFLIGHT_FOLDER,
    RESOLVED_COPY_NAME,
    SKIPPED_STEPS_NAME,
    START_NAME,
    STEP_PREFIX,
    SUBMISSION_NAME,
    SUBMITTED_FOLDER,
)
from megaback.yaml_text import read_yaml_file

_MADE_BEFORE_THE_HISTORY = frozenset(
    {
        LOCK_NAME,
        START_NAME,
        BASE_FOLDER,
        CHECKPOINTS_FOLDER,
        CONVERTED_FOLDER,
        HEARTBEATS_FOLDER,
        LOGS_FOLDER,
        SUBMITTED_FOLDER,
    }
)
_WORK_FOLDERS = (HEARTBEATS_FOLDER, SUBMITTED_FOLDER, PREFLIGHT_FOLDER)
"""Folders of a run in which files are written and removed; others may be links to another disk."""
_SNAPSHOT = re.compile(r"\d{8}-\d{6}(-\d+)?")
_JUNK = frozenset({".DS_Store", "lost+found"})


def require_run_folder(config: Config, given: Path | None = None) -> None:
    """Require that a run may be written into its folder. Raises OutputExistsError.

    `given`, the file of the config, may be in the folder, as may files that this process prints
    to; neither is overwritten.
    """
    run = config.run
    if run.exists() and not run.is_dir():
        raise OutputExistsError(f"run {run} is a file; choose another run folder")
    inputs = [*(part.path for part in config.data.shards), config.init_from]
    trunk = config.branch_from
    if isinstance(trunk, Path) and (trunk / CHECKPOINTS_FOLDER).is_dir():
        trunk = trunk / CHECKPOINTS_FOLDER  # the branch may be below the rest of the run
    inputs.append(trunk)
    require_apart(run, inputs, "run")
    for name in _WORK_FOLDERS:
        require_no_link(run / name, "run")
    require_own_checkpoints(run)
    if is_run_of_ours(run):
        return
    foreign = list(_foreign_entries(run, given))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise OutputExistsError(
            f"run {run} is not empty and not a megaback run: it contains {foreign[0].name}{more}; "
            "choose another run folder"
        )


def require_own_checkpoints(run: Path) -> None:
    """Require that a run's checkpoints, which may be behind a link, are not another run's.

    Rotation would delete those. Raises OutputExistsError.
    """
    folder = run / CHECKPOINTS_FOLDER
    if folder.is_symlink() and (folder.resolve().parent / HISTORY_NAME).exists():
        raise OutputExistsError(
            f"{folder} is a symbolic link to the checkpoints of another run, "
            f"{folder.resolve().parent}; remove the link, or choose another run"
        )


def is_run_of_ours(run: Path) -> bool:
    """Whether a folder belongs to a run that was started or submitted."""
    history = read_history(run)
    if any({"event", "time"} <= line.keys() for line in history):
        return True
    return any(_is_snapshot(path) for path in run.glob(f"{SUBMITTED_FOLDER}/*/{SUBMISSION_NAME}"))


def config_of_run(run: Path) -> Path:
    """Path of the resolved config of a run's newest start."""
    resolved = run / RESOLVED_COPY_NAME
    return resolved if resolved.is_file() else run / CONFIG_COPY_NAME


def place_of_config(run: Path, given: Path | None) -> Path | None:
    """Path at which to write the resolved config; None if it must not be written.

    Neither the given file nor one that a user has edited is replaced.
    """
    place = config_of_run(run)
    if _is_same_file(given, run / RESOLVED_COPY_NAME):
        return None
    if place.name == CONFIG_COPY_NAME and place.exists():
        is_given = _is_same_file(given, place)
        if is_given or not _is_as_written(place):
            return run / RESOLVED_COPY_NAME
    return place


def _foreign_entries(run: Path, given: Path | None) -> Iterator[Path]:
    """Files and folders that are neither ours, nor empty, nor output or config of this process."""
    if not run.is_dir():
        return
    printed_to = {_identity(os.fstat(number)) for number in (1, 2) if _is_open(number)}
    for path in sorted(run.iterdir()):
        if path.name in _JUNK or path.name.startswith(".nfs") or _is_same_file(given, path):
            continue
        if path.is_file() and _identity(path.stat()) in printed_to:
            continue
        if path.is_dir() and not _holds_files(path):
            continue
        if path.name in _MADE_BEFORE_THE_HISTORY and _is_left_by_us(path):
            continue
        yield path


def _is_left_by_us(path: Path) -> bool:
    """Whether a path is from a start that was interrupted before it wrote the history."""
    if path.name == LOCK_NAME:
        return path.stat().st_size == 0 or lock_holder(path.parent) is not None
    if path.name == START_NAME:
        return read_start(path.parent) is not None
    if path.name == HEARTBEATS_FOLDER:
        return all(one.name.startswith(HEARTBEAT_PREFIX) for one in path.iterdir())
    if path.name == CHECKPOINTS_FOLDER:  # fetched from the second place
        return all(one.name.startswith((STEP_PREFIX, FETCHED_NAME)) for one in path.iterdir())
    if path.name == BASE_FOLDER:  # fetched from a URL
        ours = (CHECKPOINTS_FOLDER, SKIPPED_STEPS_NAME)
        return all(one.name in ours for one in path.iterdir())
    if path.name == CONVERTED_FOLDER:  # models of fetched checkpoints
        return all(
            one.name.startswith((LOCK_NAME, STEP_PREFIX, f".{STEP_PREFIX}"))
            for one in path.iterdir()
        )
    if path.name == SUBMITTED_FOLDER:  # a snapshot that was not queued
        return all(_SNAPSHOT.fullmatch(one.name) for one in path.iterdir())
    return False


def _is_snapshot(path: Path) -> bool:
    try:
        return "jobs" in read_json(path)
    except (OSError, ValueError, TypeError):
        return False


def _is_as_written(path: Path) -> bool:
    """Whether a config is as we wrote it, with no edits or comments of a user."""
    try:
        written = yaml.safe_dump(read_yaml_file(path), sort_keys=False)
        return written == path.read_text(encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _holds_files(folder: Path) -> bool:
    """Whether a folder contains a file at any depth.

    Without recursion: folders may be nested thousands deep.
    """
    left = [folder]
    try:
        while left:
            for path in left.pop().iterdir():
                if path.is_symlink() or not path.is_dir():
                    return True
                left.append(path)
    except OSError:
        return True  # unknown
    return False


def _is_same_file(left: Path | None, right: Path) -> bool:
    return left is not None and left.exists() and right.exists() and left.samefile(right)


def _is_open(number: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(number).st_mode)
    except OSError:
        return False


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino
