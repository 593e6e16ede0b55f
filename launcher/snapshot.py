"""What exactly was submitted: `RUN/submitted/<time>/`, made before the job is queued.

It holds the resolved config that the job reads, copies of the sbatch files that Slurm runs, and
which code that was: the version of the package or the commit, with the changes since.
"""

import getpass
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.command import write_text
from launcher.run_folder import SUBMISSION_NAME, SUBMITTED_FOLDER
from megaback import __version__
from megaback.config import CONFIG_COPY_NAME, Config

CHANGES_NAME = "changes.diff"
LOGS_FOLDER = "logs"


def new_folder(run: Path) -> Path:
    """The name of a snapshot that is not there yet. Nothing is written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = run / SUBMITTED_FOLDER / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{stamp}-{number}")
    return folder.absolute()


def code_version() -> tuple[dict[str, Any], str]:
    """Which code this is, and what was changed since its commit."""
    root = Path(__file__).resolve().parents[1]
    version: dict[str, Any] = {"megaback": __version__, "python": sys.version.split()[0]}
    if not (root / ".git").exists():
        return version, ""
    commit, changes, status = (
        _git(root, *words)
        for words in (("rev-parse", "HEAD"), ("diff", "HEAD"), ("status", "--porcelain"))
    )
    if commit is None:
        return version, ""
    untracked = [line[3:] for line in (status or "").splitlines() if line.startswith("??")]
    version |= {
        "commit": commit.strip(),
        "is_changed": bool(changes),
        "untracked": untracked,
    }
    return version, changes or ""


def write_snapshot(folder: Path, config: Config, files: Sequence[Path]) -> dict[str, Any]:
    """Make the snapshot. Returns the fields that say what it is. Raises OSError."""
    folder.mkdir(parents=True)
    (config.run / LOGS_FOLDER).mkdir(exist_ok=True)
    write_text(folder / CONFIG_COPY_NAME, config.to_yaml())
    for file in files:
        shutil.copyfile(file, folder / file.name)
    version, changes = code_version()
    if changes:
        write_text(folder / CHANGES_NAME, changes)
    return {
        "time": time.time(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "command": sys.argv[1:],
        "environment": sys.prefix,
        "code": version,
    }


def record_jobs(folder: Path, fields: Mapping[str, Any], jobs: Sequence[Mapping[str, str]]) -> None:
    """Write down what was queued. Raises OSError."""
    text = json.dumps({**fields, "jobs": [dict(job) for job in jobs]}, indent=2)
    write_text(folder / SUBMISSION_NAME, text + "\n")


def remove_snapshot(folder: Path) -> None:
    """Leave no trace of a submission that came to nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    run = folder.parents[1]
    for empty in (folder.parent, run / LOGS_FOLDER, run):
        try:
            empty.rmdir()
        except OSError:  # others' files are in it
            continue


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
