"""`megaback jobs`: runs, their Slurm jobs, and their progress.

The jobs are those that `megaback submit` has recorded in the run's folder and those in the run's
history. Their state is from Slurm while it remembers them, then from the run's folder; accounting
is not needed.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.durations import duration
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import table_lines
from data_pipeline.errors import CheckpointMissingError
from launcher.slurm.commands import Job, find_job
from megaback.faults.exit_record import read_history
from megaback.faults.run_state import assess_run
from megaback.tracking.run_progress import jobs_of, read_progress, runs_below

_MAX_JOBS = 8
_HEADS = ("RUN", "JOB", "STATE", "RESTARTS", "STEP", "LOSS", "TO TRAIN", "JOB ENDS IN", "WHY")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A run with one of its jobs; unknown fields are None."""

    run: str
    job: str | None
    stage: str | None
    state: str
    restarts: int
    step: int | None
    total_steps: int | None
    loss: float | None
    to_train_s: float | None
    """Estimated seconds left to train, from the last steps."""
    job_left_s: int | None
    """Seconds until the job's time limit."""
    nodes: str | None
    why: str | None


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs among folders and below them, down to those of an arrow of time.

    Raises CheckpointMissingError if there is none.
    """
    runs = [run for folder in folders for run in runs_below(folder)]
    if not runs:
        names = ", ".join(str(folder) for folder in folders)
        raise CheckpointMissingError(
            f"{names} has no run that was started or submitted; give the folder of a run, or one "
            "that contains runs"
        )
    return runs


def rows_of_run(run: Path) -> list[Row]:
    """A run with each of its active jobs; with its newest if none is active."""
    known = list(jobs_of(run).items())[-_MAX_JOBS:]
    found = [(job, stage, find_job(job)) for job, stage in known]
    row = _row_of(run)
    shown = [entry for entry in found if entry[2] is not None and not entry[2].is_over]
    if not shown and row.state != "not started":
        shown = [entry for entry in found if entry[1] == "train"][-1:]
    return [_with_job(row, *entry) for entry in shown or found] or [row]


def _with_job(row: Row, number: str, stage: str, job: Job | None) -> Row:
    """Add Slurm's state of a job; None if Slurm has forgotten it."""
    row = replace(row, job=number, stage=stage)
    if job is None:
        return row
    if job.is_over:
        has_ended = row.state.startswith(("finished", "stopped", "rolled back"))
        state = row.state if has_ended else _describe(job)
        return replace(row, state=state, restarts=job.restarts)
    return replace(
        row,
        state=_describe(job),
        restarts=job.restarts,
        job_left_s=job.left_s,
        nodes=job.nodes,
        to_train_s=row.to_train_s if job.state == "RUNNING" else None,
        why=job.reason,
    )


def _row_of(run: Path) -> Row:
    """The row from the run's folder alone."""
    starts = [line for line in read_history(run) if line.get("event") == "start"]
    total_steps = starts[-1].get("total_steps") if starts else None
    progress = read_progress(run)
    times = [] if progress is None or progress.median_step_s is None else [progress.median_step_s]
    assessed = assess_run(run, times, time.time())
    to_train_s = None
    if progress is not None and progress.median_step_s is not None and total_steps is not None:
        done = progress.step if assessed.rolled_back_to is None else assessed.rolled_back_to
        to_train_s = max(total_steps - done, 0) * progress.median_step_s
    state: str = assessed.state if starts or assessed.has_ended else "not started"
    why: str | None = None if state in ("finished", "running", "not started") else assessed.reason
    step = progress.step if progress is not None else None
    if assessed.rolled_back_to is not None:
        state, step = "rolled back", assessed.rolled_back_to
    elif assessed.state == "stopped":
        state, why = f"stopped ({assessed.code})", assessed.ending
    return Row(
        run=str(run),
        job=None,
        stage=None,
        state=state,
        restarts=max(len(starts) - 1, 0),
        step=step,
        total_steps=total_steps,
        loss=progress.loss if progress is not None else None,
        to_train_s=to_train_s if state != "finished" else None,
        job_left_s=None,
        nodes=None,
        why=why,
    )


def _describe(job: Job) -> str:
    if not job.elements:
        return job.state.lower()
    return ", ".join(f"{count} {state.lower()}" for state, count in job.elements.items())


def table(rows: Sequence[Row]) -> str:
    """The rows as an aligned table."""
    return "\n".join(table_lines(_HEADS, [_cells(row) for row in rows]))


def _cells(row: Row) -> tuple[str, ...]:
    job = "-" if row.job is None else row.job
    if row.stage not in (None, "train"):
        job += f" ({row.stage})"
    step = "-" if row.step is None else f"{row.step:,}"
    if row.total_steps is not None:
        step += f"/{row.total_steps:,}"
    return (
        row.run,
        job,
        row.state,
        str(row.restarts),
        step,
        "-" if row.loss is None else f"{row.loss:.4f}",
        duration(row.to_train_s),
        duration(row.job_left_s),
        row.why or "",
    )


@click.command(
    cls=Command,
    name="jobs",
    epilog=examples(
        "megaback jobs",
        "megaback jobs runs/xcoax_100bt --json",
    ),
)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[RUNS_FOLDER]...")
@json_option
def main(folders: tuple[Path, ...], as_json: bool) -> None:
    """Show the runs in RUNS_FOLDER (default: runs), their Slurm jobs, and their progress.

    A RUNS_FOLDER may be a run, or contain runs up to three levels below it. TO TRAIN is the time
    left at the pace of the last steps. --json prints one object per line.
    """
    rows = [row for run in find_runs(folders or (Path("runs"),)) for row in rows_of_run(run)]
    if as_json:
        for row in rows:
            click.echo(json.dumps(asdict(row)))
    else:
        click.echo(table(rows))


if __name__ == "__main__":
    main()
