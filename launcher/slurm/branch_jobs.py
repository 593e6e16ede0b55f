"""Jobs of a run and of its branches (`optimizer.decay_at`): each branch follows the trunk's job.

A branch is a run: its folder has its own snapshot, record of jobs and logs, and its job resumes and
requeues like that of any run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.common.interrupts import signals_deferred
from launcher.slurm.commands import Submission, cancel, queue
from launcher.slurm.snapshot import new_folder, record_jobs, remove_snapshot, write_snapshot
from megaback.config import Config
from megaback.horizons import branch_config, horizons_of


@dataclass(frozen=True)
class RunJobs:
    """A run, its snapshot, and its jobs, each after the one before."""

    config: Config
    snapshot: Path
    submissions: tuple[Submission, ...]

    def from_snapshot(self, submission: Submission) -> Submission:
        """A submission of the copy of its file in the snapshot."""
        return replace(submission, file=str(self.snapshot / Path(submission.file).name))


def branch_jobs(
    trunk: Config, submissions_of: Callable[[Config, Path, str], Sequence[Submission]]
) -> list[RunJobs]:
    """The jobs of each branch of a run; none without horizons.

    `submissions_of` makes them from the branch's config, its snapshot and the horizon's name.
    """
    found = []
    for horizon in horizons_of(trunk):
        config = branch_config(trunk, horizon)
        snapshot = new_folder(config.run)
        jobs = tuple(submissions_of(config, snapshot, horizon.name))
        found.append(RunJobs(config, snapshot, jobs))
    return found


def queue_tree(
    trunk: RunJobs, branches: Sequence[RunJobs], shared: Sequence[Path]
) -> list[list[str]]:
    """Queue the jobs of a run, and those of its branches after its training job. Returns their ids.

    `shared`: files that the sbatch files need beside them. Raises LaunchError, and then leaves no
    job and no snapshot behind.
    """
    queued: list[list[str]] = []
    try:
        queued.append(_queue_run(trunk, shared))
        stages = [submission.stage for submission in trunk.submissions]
        trained = queued[0][stages.index("train")]
        for branch in branches:
            queued.append(_queue_run(branch, shared, trained))
    except BaseException:
        for jobs in queued:
            for job in jobs:
                cancel(job)
        for run in (*branches, trunk):
            remove_snapshot(run.snapshot)
        raise
    return queued


def _queue_run(run: RunJobs, shared: Sequence[Path], before: str | None = None) -> list[str]:
    """Make a run's snapshot and queue its jobs, the first one after the job `before`.

    Raises LaunchError, and then leaves no job behind.
    """
    files = dict.fromkeys(Path(submission.file) for submission in run.submissions)
    fields = write_snapshot(run.snapshot, run.config, [*files, *shared])
    jobs: list[str] = []
    recorded: list[dict[str, str]] = []
    try:
        for submission in map(run.from_snapshot, run.submissions):
            linked = submission if before is None else after(submission, before)
            with signals_deferred():  # so that a queued job's id is known
                before = queue(linked)
                jobs.append(before)
            recorded.append({"stage": linked.stage, "job": before, "line": linked.line})
            record_jobs(run.snapshot, fields, recorded)
    except BaseException:
        for job in jobs:
            cancel(job)
        raise
    return jobs


def after(submission: Submission, job: str) -> Submission:
    """A submission that starts after another job has succeeded, and is canceled if that fails."""
    link = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    return replace(submission, options=(*submission.options, *link))
