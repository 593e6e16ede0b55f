"""Progress of a run from its folder: its step, its loss, its jobs.

Only small files and the ends of long ones are read.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import read_json
from megaback.faults.exit_record import read_history
from megaback.faults.run_records import last_lines
from megaback.run_folder import (
    BRANCHES_FOLDER,
    HISTORY_NAME,
    METRICS_NAME,
    SUBMISSION_NAME,
    SUBMITTED_FOLDER,
)
from megaback.tracking.metrics import parsed_line

_TAIL_BYTES = 1 << 16
_DEPTH = 3
"""Depth of runs/ARROW/seed-N/DIRECTION below runs/."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run."""

    step: int
    loss: float | None
    """Training loss of the last step that was not excluded, in nats per token."""
    median_step_s: float | None


def is_run(folder: Path) -> bool:
    """Whether a folder belongs to a run that was started or submitted."""
    return (folder / HISTORY_NAME).is_file() or bool(read_submissions(folder))


def runs_below(folder: Path) -> Iterator[Path]:
    """The folder, if it is a run; else the runs below it, down to those of an arrow of time.

    Each run is followed by its branches.
    """
    return _runs_below(folder, _DEPTH, {})


def _runs_below(folder: Path, depth: int, seen: dict[tuple[int, int], int]) -> Iterator[Path]:
    """`seen` has the depth to which each folder was searched: links may lead back to it."""
    if not os.access(folder, os.R_OK | os.X_OK) or not folder.is_dir():
        return
    facts = folder.stat()
    if seen.get((facts.st_dev, facts.st_ino), -1) >= depth:
        return
    seen[facts.st_dev, facts.st_ino] = depth
    if is_run(folder):
        seen[facts.st_dev, facts.st_ino] = _DEPTH
        yield folder
        branches = folder / BRANCHES_FOLDER
        for path in sorted(branches.iterdir()) if branches.is_dir() else ():
            yield from _runs_below(path, 0, seen)
    elif depth:
        for path in sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path)):
            yield from _runs_below(path, depth - 1, seen)


def read_progress(run: Path) -> Progress | None:
    """The last step of the metrics; None before there is one."""
    lines = last_metrics(run)
    if not lines:
        return None
    with_loss = [line for line in lines if line.get("loss") is not None]
    times = [float(line["step_s"]) for line in lines if line.get("step_s") is not None]
    return Progress(
        step=int(lines[-1]["step"]),
        loss=float(with_loss[-1]["loss"]) if with_loss else None,
        median_step_s=statistics.median(times) if times else None,
    )


def read_submissions(run: Path) -> list[dict[str, Any]]:
    """Records of `megaback submit`, oldest first; unreadable ones are skipped."""
    found = []
    for path in sorted((run / SUBMITTED_FOLDER).glob(f"*/{SUBMISSION_NAME}")):
        try:
            fields = read_json(path)
            jobs = [
                {**job, "job": str(job["job"]), "stage": str(job["stage"])}
                for job in fields["jobs"]
            ]
            found.append({**fields, "jobs": jobs})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def jobs_of(run: Path) -> dict[str, str]:
    """The past, running and queued Slurm jobs of a run: job id to stage, oldest first."""
    known = {str(line["job"]): "train" for line in read_history(run) if line.get("job") is not None}
    for submission in read_submissions(run):
        known |= {job["job"]: job["stage"] for job in submission["jobs"]}
    return dict(sorted(known.items(), key=lambda item: (len(item[0]), item[0])))


def events_of_job(run: Path, job: str, event: str) -> Sequence[dict[str, Any]]:
    """Lines of the history that a Slurm job wrote, oldest first."""
    return [
        line
        for line in read_history(run)
        if line.get("event") == event and str(line.get("job")) == job
    ]


def last_metrics(run: Path) -> list[dict[str, Any]]:
    """The last readable lines of a run's metrics."""
    try:
        texts = last_lines(run / METRICS_NAME, _TAIL_BYTES)
    except OSError:
        return []
    return [line for text in texts if (line := parsed_line(text))]
