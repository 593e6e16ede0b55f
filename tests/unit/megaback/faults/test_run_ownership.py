"""A run's folder is one that megaback made, or an empty one; a user's config is not replaced."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import OutputExistsError
from megaback.faults.exit_record import record_start
from megaback.faults.run_lock import lock_run
from megaback.faults.run_ownership import config_of_run, place_of_config, require_run_folder
from megaback.faults.start_fence import begin_start
from megaback.run_folder import RESOLVED_COPY_NAME
from tests.helpers.run_config import run_config
from tools.rollback import roll_back


def require(run: Path, given: Path | None = None, **sections: Any) -> None:
    require_run_folder(run_config(run, **sections), given)


def write(path: Path, text: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def unlocked(run: Path) -> None:
    """Lock a run's folder and release it, which leaves the lock's file."""
    lock = lock_run(run)
    assert lock is not None
    lock.close()


FREE: dict[str, Callable[[Path], None]] = {
    "nothing": lambda run: run.unlink(missing_ok=True),
    "an empty folder": lambda run: run.mkdir(),
    "empty folders": lambda run: (run / "checkpoints").mkdir(parents=True),
    "a run": lambda run: (run.mkdir(), record_start(run, step=0), write(run / "notes.txt"))[0],
    "a run that was submitted": lambda run: write(
        run / "submitted" / "20260101-000000" / "submission.json", json.dumps({"jobs": []})
    ),
    "an interrupted start": lambda run: (
        write(run / ".lock", ""),
        begin_start(run),
        write(run / "heartbeats" / "rank-00000.json"),
        write(run / "checkpoints" / "step-00000010" / "meta.json"),
    )[0],
    "a start that was refused": lambda run: (run.mkdir(), unlocked(run))[0],
    "fetched checkpoints that were used as a model": lambda run: (
        write(run / "checkpoints" / "step-00000010" / "meta.json"),
        write(run / ".base" / "checkpoints" / ".fetched.partial" / "meta.json"),
        write(run / "converted" / ".lock", ""),
        write(run / "converted" / "step-00000010-0123456789ab" / "config.json"),
    )[0],
    "a mount point": lambda run: write(run / "lost+found" / "x"),
}
FOREIGN: dict[str, Callable[[Path], None]] = {
    "a config": lambda run: write(run / "config.yaml"),
    "metrics": lambda run: write(run / "metrics.jsonl", '{"step": 1}\n'),
    "a data set": lambda run: write(run / "manifest.json", "{}"),
    "a model": lambda run: write(run / "config.json", "{}"),
    "a home": lambda run: write(run / ".bashrc"),
    "a project": lambda run: write(run / "src" / "main.py"),
    "checkpoints of others": lambda run: write(run / "checkpoints" / "last.ckpt"),
    "something in the place of a base": lambda run: write(run / ".base" / "talk.mp4"),
    "conversions of others": lambda run: write(run / "converted" / "talk.mp4"),
    "logs": lambda run: write(run / "logs" / "train-1.out"),
    "a history of others": lambda run: write(run / "history.jsonl", '{"version": 1}\n'),
    "a lock of others": lambda run: write(run / ".lock", "poetry"),
    "a start of others": lambda run: write(run / ".start", "npm start"),
}


@pytest.mark.parametrize("name", FREE)
def test_a_free_folder_is_accepted(name: str, tmp_path: Path) -> None:
    FREE[name](tmp_path / "run")

    require(tmp_path / "run")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_refused(name: str, tmp_path: Path) -> None:
    FOREIGN[name](tmp_path / "run")

    with pytest.raises(OutputExistsError, match="not a megaback run"):
        require(tmp_path / "run")


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "metrics.jsonl")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(OutputExistsError, match=r"metrics\.jsonl"):
        require(Path())


def test_a_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run")

    with pytest.raises(OutputExistsError, match="is a file"):
        require(tmp_path / "run")


@pytest.mark.parametrize("run", ["shards", "shards/run", ".", "model"])
def test_a_run_is_kept_apart_from_what_it_reads(run: str, tmp_path: Path) -> None:
    """Also if it is there already."""
    for name in ("shards", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / run).mkdir(exist_ok=True)
    record_start(tmp_path / run, step=0)

    with pytest.raises(OutputExistsError, match="the input"):
        require(
            tmp_path / run,
            data={"shards": str(tmp_path / "shards")},
            init_from=tmp_path / "model",
        )


def test_the_given_config_may_be_in_the_folder_of_its_run(tmp_path: Path) -> None:
    """It is not changed, and the resolved one is written under another name."""
    run, given = tmp_path / "run", tmp_path / "run" / "config.yaml"
    write(given, "# mine\nrun: run\n")

    require(run, given)

    assert place_of_config(run, given) == run / RESOLVED_COPY_NAME
    write(run / RESOLVED_COPY_NAME)
    assert place_of_config(run, tmp_path / "other.yaml") == run / RESOLVED_COPY_NAME
    assert config_of_run(run) == run / RESOLVED_COPY_NAME
    assert place_of_config(run, run / RESOLVED_COPY_NAME) is None


def test_our_copy_of_a_config_is_replaced_and_an_edited_one_is_not(tmp_path: Path) -> None:
    copy = tmp_path / "config.yaml"
    assert place_of_config(tmp_path, None) == copy
    text = run_config(tmp_path).to_yaml()
    write(copy, text)
    assert place_of_config(tmp_path, tmp_path / "other.yaml") == copy
    assert config_of_run(tmp_path) == copy

    write(copy, f"# lower after the spike\n{text}")

    assert place_of_config(tmp_path, tmp_path / "other.yaml") == tmp_path / RESOLVED_COPY_NAME


@pytest.mark.parametrize("name", ["heartbeats", "submitted", ".preflight"])
def test_a_run_whose_work_folder_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    record_start(tmp_path / "run", step=0)
    for linked in ("checkpoints", "logs", "tensorboard"):  # on another disk
        (tmp_path / "disk" / linked).mkdir(parents=True)
        (tmp_path / "run" / linked).symlink_to(tmp_path / "disk" / linked)
    require(tmp_path / "run")
    (tmp_path / "run" / name).symlink_to(tmp_path / "disk")
    with pytest.raises(OutputExistsError, match="choose another run"):
        require(tmp_path / "run")


def test_checkpoints_may_be_on_another_disk_but_not_in_another_run(tmp_path: Path) -> None:
    """Rotation would delete those of the other run."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    write(run / "history.jsonl", '{"event": "start", "time": 1}\n')
    (run / "checkpoints").symlink_to(elsewhere / "checkpoints")
    require(run)
    write(elsewhere / "history.jsonl", "")
    with pytest.raises(OutputExistsError, match="checkpoints of another run"):
        require(run)
    with pytest.raises(OutputExistsError, match="checkpoints of another run"):
        roll_back(run, 1)


def test_folders_that_are_nested_thousands_deep_are_foreign(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    here = os.open(tmp_path / "run", os.O_RDONLY)
    for _ in range(2200):
        os.mkdir("a", dir_fd=here)
        inner = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    with pytest.raises(OutputExistsError, match="is not empty"):
        require(tmp_path / "run")
    subprocess.run(["rm", "-r", tmp_path / "run"], check=True)  # pytest cannot


def test_a_branch_may_be_below_its_trunk_but_not_in_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()

    require(tmp_path / "branches/anneal", branch_from=tmp_path)
    with pytest.raises(OutputExistsError, match="within the input"):
        require(tmp_path / "checkpoints/anneal", branch_from=tmp_path)
