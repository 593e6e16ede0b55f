"""Runs that are queued as one array of jobs, one run per element.

Each element requeues and resumes by itself, as a job of a single run does. The array reads a
snapshot, FOLDER/submitted/<time>/, with the config of each element; every run's folder records its
element, so that `megaback jobs` finds it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic import write_text
from data_pipeline.common.interrupts import signals_deferred
from data_pipeline.errors import ConfigError
from launcher.slurm.commands import Submission, cancel, queue
from launcher.slurm.job_request import JobRequest
from launcher.slurm.sbatch_files import SHARED_FILES
from launcher.slurm.snapshot import new_folder, record_jobs, remove_snapshot, write_snapshot
from launcher.slurm.stages import train_stage
from launcher.slurm.submit import require_no_job, try_out
from megaback.config import Config
from megaback.faults.run_ownership import require_run_folder
from megaback.run_folder import LOGS_FOLDER

_SUFFIX = ".yaml"
_ALIKE: dict[str, Any] = {
    "run": True,
    "optimizer": {"learning_rate", "matrix_learning_rate"},
    "training": {"seed"},
}
"""Keys on which neither the memory of a run nor its data depends."""


@dataclass(frozen=True)
class RunArray:
    """Configs of the runs of one array, in the order of its elements; all have one sbatch file."""

    folder: Path
    """Folder of the snapshot and the logs."""
    configs: Sequence[Config]
    request: JobRequest
    max_running: int | None
    """Maximum number of runs at a time."""

    def submission(self, snapshot: Path) -> Submission:
        """The call of sbatch, for a snapshot in a folder. Raises ConfigError, LaunchError."""
        first = self.configs[0]
        at_a_time = "" if self.max_running is None else f"%{self.max_running}"
        file = self.request.file_of(first)
        submission = train_stage(
            first.model_copy(update={"run": self.folder}),
            file,
            snapshot / f"%a{_SUFFIX}",
            self.request.allocation_of(first),
            self.request.resources(),
            self.request.max_requeues,
            array=f"0-{len(self.configs) - 1}{at_a_time}",
        )
        return replace(submission, file=str(snapshot / file.name))

    @property
    def line(self) -> str:
        """The command line that would queue the array now. Raises ConfigError, LaunchError."""
        return self.submission(new_folder(self.folder)).line

    def check(self, path: Path, *, may_be_away: bool) -> str:
        """Refuse, before anything is queued, runs that cannot work or have a job already.

        `path`: file of their config. Slurm tests the array, if it is there or must be. Returns
        lines about the runs' memory, and why Slurm was not asked. Raises ConfigError, LaunchError,
        OutputExistsError and the errors of `JobRequest.check`.
        """
        kinds = {
            (self.request.file_of(config), self.request.allocation_of(config))
            for config in self.configs
        }
        if len(kinds) > 1:
            raise ConfigError(
                "the elements of an array have the same resources, and these runs differ in "
                "hardware or init_from; give one value of each"
            )
        checked: dict[str, str] = {}
        for config in self.configs:
            require_run_folder(config, path)
            require_no_job(config.run)
            kind = config.model_dump_json(exclude=_ALIKE)
            if kind not in checked:
                checked[kind] = self.request.check(config)
        file = str(self.request.file_of(self.configs[0]))
        submission = replace(self.submission(new_folder(self.folder)), file=file)
        unasked = try_out([submission], may_be_away=may_be_away)
        tested = [f"not tested by Slurm, since {unasked}"] if unasked else []
        return "\n".join([*dict.fromkeys(checked.values()), *tested])

    def queue(self) -> str:
        """Write the snapshot and queue the array. Returns its job id.

        Raises LaunchError and OSError, and then leaves no job and no snapshot behind.
        """
        snapshot = new_folder(self.folder)
        written = [snapshot]
        job = ""
        submission = self.submission(snapshot)
        try:
            snapshot.mkdir(parents=True)
            (self.folder / LOGS_FOLDER).mkdir(exist_ok=True)
            for name in (self.request.file_of(self.configs[0]).name, *SHARED_FILES):
                shutil.copyfile(self.request.folder / name, snapshot / name)
            records = []
            for index, config in enumerate(self.configs):
                write_text(snapshot / f"{index}{_SUFFIX}", config.to_yaml())
                own = new_folder(config.run)
                written.append(own)
                records.append((own, write_snapshot(own, config, ())))
            with signals_deferred():  # so that a queued job's id is known
                job = queue(submission)
            for index, (own, fields) in enumerate(records):
                element = {"stage": "train", "job": f"{job}_{index}", "line": submission.line}
                record_jobs(own, fields, [element])
        except BaseException:
            if job:
                cancel(job)
            for folder in written:
                remove_snapshot(folder)
            raise
        return job
