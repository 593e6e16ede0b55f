"""Training of a sweep's runs on this machine, one after the other."""

from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.common.command import report
from data_pipeline.errors import (
    BackendError,
    MegabackError,
    NonFiniteError,
    PreemptedError,
    PreflightError,
    StorageError,
    UserInterruptError,
)
from launcher.ranks.hostfile import read_hostfile
from launcher.ranks.local import count_ranks
from launcher.train import train
from megaback.data import open_data
from megaback.faults.run_ownership import require_run_folder
from tools.sweeps.plan import SweepPlan
from tools.sweeps.result import result_of
from tools.sweeps.runs import SweepRun, data_kind

_STOPPING = {
    error.exit_code
    for error in (
        BackendError,
        PreemptedError,
        PreflightError,
        StorageError,
        UserInterruptError,
    )
}
"""Exit codes after which no other run is started: of a stop on request, or of this machine."""


def require_trainable(path: Path, runs: Sequence[SweepRun], hostfile: Path | None) -> None:
    """Require that every run may be written and has its data, which is opened once per kind.

    Raises the errors of `require_run_folder` and `open_data`, and LaunchError.
    """
    slots = None if hostfile is None else sum(host.slots for host in read_hostfile(hostfile))
    opened = set()
    for run in runs:
        require_run_folder(run.config, path)
        num_ranks = slots or count_ranks(run.config)
        kind = (data_kind(run.config), num_ranks)
        if kind not in opened:
            open_data(run.config, 0, num_ranks)
            opened.add(kind)


def train_all(config: Path, plan: SweepPlan, save_before: str | None, hostfile: Path | None) -> int:
    """Train or resume each run that is not over. Returns the exit code of the first that failed.

    A run that fails is reported, and the others are trained, unless the sweep was asked to stop or
    the machine is the cause.
    """
    first_code = 0
    known = result_of(plan.record, plan.out)
    plan.record.write(plan.out, known.to_json())
    over = {run.name for run in known.runs if run.is_over}
    for number, run in enumerate(plan.runs, start=1):
        if run.name in over:
            continue
        click.echo(f"run {number} of {len(plan.runs)}: {run.config.run}")
        try:
            code = train(config, run.overrides, save_before, hostfile)
        except MegabackError as error:
            code = report(error)
        known = result_of(plan.record, plan.out, known)
        plan.record.write(plan.out, known.to_json())
        if code not in (0, NonFiniteError.exit_code):
            first_code = first_code or code
        if code in _STOPPING:
            return code
    return first_code
