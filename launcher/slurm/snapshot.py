"""Snapshot of a submission: `RUN/submitted/<time>/`, made before the job is queued.

It has the resolved config that the job reads, copies of the sbatch files that Slurm runs, and the
version of the code: that of the package, or the commit with the changes since.
"""

import getpass
import json
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic import write_text
from data_pipeline.redaction import scrub
from megaback.config import Config
from megaback.run_folder import (
    BRANCHES_FOLDER,
    CHANGES_NAME,
    CONFIG_COPY_NAME,
    LOGS_FOLDER,
    SUBMISSION_NAME,
    SUBMITTED_FOLDER,
)
from megaback.tracking.code_version import code_changes, code_version


def new_folder(run: Path) -> Path:
    """Path of a new snapshot. Nothing is written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = run / SUBMITTED_FOLDER / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{stamp}-{number}")
    return folder.absolute()


def write_snapshot(folder: Path, config: Config, files: Sequence[Path]) -> dict[str, Any]:
    """Make the snapshot. Returns the fields of its record. Raises OSError."""
    folder.mkdir(parents=True)
    (config.run / LOGS_FOLDER).mkdir(exist_ok=True)
    write_text(folder / CONFIG_COPY_NAME, config.to_yaml())
    for file in files:
        shutil.copyfile(file, folder / file.name)
    changes = code_changes()
    if changes:
        write_text(folder / CHANGES_NAME, scrub(changes))  # a config may be among them
    return {
        "time": time.time(),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "command": [scrub(word) for word in sys.argv[1:]],
        "environment": sys.prefix,
        "code": code_version(),
    }


def record_jobs(folder: Path, fields: Mapping[str, Any], jobs: Sequence[Mapping[str, str]]) -> None:
    """Record the queued jobs. Raises OSError."""
    text = json.dumps({**fields, "jobs": [dict(job) for job in jobs]}, indent=2)
    write_text(folder / SUBMISSION_NAME, text + "\n")


def remove_snapshot(folder: Path) -> None:
    """Remove the snapshot of a failed submission, and folders that are then empty."""
    shutil.rmtree(folder, ignore_errors=True)
    run = folder.parents[1]
    of_branches = [run.parent] if run.parent.name == BRANCHES_FOLDER else []
    for empty in (folder.parent, run / LOGS_FOLDER, run, *of_branches):
        try:
            empty.rmdir()
        except OSError:  # it has other files
            continue
