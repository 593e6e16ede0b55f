"""Start and end of a training job on Slurm, called by `slurm/ranks.sh`.

`begin` refuses an invalid run, and records the job in the run's history. `end` determines how the
ranks ended, whatever srun returned, and requeues the job at the time limit, after a lost rank and,
if configured, without nodes that preflight has named; the number of requeues is bounded.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.common.command import CommandGroup, WorkCommand
from data_pipeline.common.number_ranges import EXIT_CODE
from data_pipeline.errors import (
    ConfigError,
    LaunchError,
    PreemptedError,
    PreflightError,
    RankLostError,
    SupersededError,
)
from data_pipeline.redaction import VARIABLE_PREFIX
from launcher.slurm.commands import find_job
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.environment import slurm_job
from megaback.faults.exit_record import read_bad_nodes, read_exit, record_event
from megaback.faults.run_ownership import require_run_folder
from megaback.run_folder import EXIT_NAME, HISTORY_NAME, newest_checkpoint_step
from megaback.tracking.run_progress import events_of_job
from megaback.yaml_text import kept_overrides

LIMIT_VARIABLE = "MEGABACK_REQUEUE_LIMIT"
DEFAULT_LIMIT = 20
REPLACE_VARIABLE = "MEGABACK_REPLACE_BAD_NODES"
JOB_EVENT = "job"
LOST_CODES = frozenset(
    (
        RankLostError.exit_code,
        *(128 + number for number in (signal.SIGABRT, signal.SIGALRM, signal.SIGKILL)),
    )
)
"""Codes of a lost rank: recorded by the others, or, if they could not, of a process that torch or
CUDA aborted (134), the watchdog's alarm ended (142) or the kernel killed (137)."""
MAX_STARTS_WITHOUT_PROGRESS = 3
"""Number of starts without a new checkpoint after which a job is not requeued."""


def requeue_limit() -> int:
    """Maximum number of requeues after lost ranks or nodes. Raises ConfigError."""
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
    if not text.isdecimal():
        raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}; give a number of restarts, 0 for none")
    return int(text)


def num_failures(run: Path, job: str, restarts: int) -> int:
    """Number of a job's restarts before which the ranks had not saved on request."""
    asked = [
        line
        for line in events_of_job(run, job, "exit")
        if line.get("code") == PreemptedError.exit_code
    ]
    return max(restarts - len(asked), 0)


def begin_job(
    config: Config, job: str, restarts: int, limit: int, num_ranks: int, given: Path | None = None
) -> None:
    """Refuse an invalid run, and record the start. Raises MegabackErrors, OSError."""
    require_run_folder(config, given)
    open_data(config, 0, num_ranks)
    failures = num_failures(config.run, job, restarts)
    if failures > limit:
        raise LaunchError(
            f"job {job} was requeued {failures} times after losing a rank or a node, more than "
            f"{LIMIT_VARIABLE}={limit}; {config.run}/{HISTORY_NAME} names the hosts: submit it "
            "again, with --exclude=HOST if one of them is bad"
        )
    config.run.mkdir(parents=True, exist_ok=True)
    record_event(config.run, JOB_EVENT, step=newest_checkpoint_step(config.run), restarts=restarts)


def true_code(run: Path, job: str, step_code: int) -> int:
    """The exit code that the ranks recorded, else the one that srun returned."""
    ending = read_exit(run)
    starts = events_of_job(run, job, JOB_EVENT)
    if ending is None or not starts or ending.get("time", 0.0) < starts[-1]["time"]:
        return step_code
    return int(ending["code"])


def has_newer_start(run: Path, job: str, restarts: int) -> bool:
    """Whether a job was restarted after this start, which lived on on a node that was cut off."""
    starts = events_of_job(run, job, JOB_EVENT)
    return any(line.get("restarts", 0) > restarts for line in starts)


def why_requeue(
    run: Path,
    job: str,
    restarts: int,
    limit: int,
    code: int,
    limit_is_near: bool,
    bad_nodes: Sequence[str] = (),
) -> tuple[bool, str | None]:
    """Whether to requeue a job that ended with a code, and a message with the reason.

    `bad_nodes` are the nodes to replace, if preflight has named some and that is configured.
    """
    # Codes above 128 near the limit: the signal killed ranks that were still starting.
    at_limit = limit_is_near and (code == PreemptedError.exit_code or code > 128)
    is_replacing = code == PreflightError.exit_code and bool(bad_nodes)
    if not at_limit and not is_replacing and code not in LOST_CODES:
        return False, None
    step = newest_checkpoint_step(run)
    cause = "time limit near" if at_limit else "a rank was lost"
    if is_replacing:
        cause = f"excluding {', '.join(bad_nodes)}"
    num_starts = 0
    for line in reversed(events_of_job(run, job, JOB_EVENT)):
        if line.get("step") != step:
            break
        num_starts += 1
    if num_starts >= MAX_STARTS_WITHOUT_PROGRESS:
        advice = "give it more --time" if at_limit else f"see {run}/{EXIT_NAME}"
        return False, (
            f"{cause}; the job has started {num_starts} times at step {step} without a newer "
            f"checkpoint, so it is not requeued: {advice}, or lower checkpoint.every_steps"
        )
    failures = num_failures(run, job, restarts)
    if not at_limit and failures >= limit:
        return False, (
            f"{cause}; the job was requeued {failures} times after such losses, the maximum of "
            f"{LIMIT_VARIABLE}, so it is not requeued: submit it again to resume"
        )
    return True, f"{cause}; the newest checkpoint is of step {step}, and the job is requeued"


def nodes_to_replace(run: Path) -> list[str]:
    """The nodes that preflight has named, if they should be replaced."""
    if not os.environ.get(REPLACE_VARIABLE):
        return []
    try:
        return read_bad_nodes(run)
    except (OSError, ValueError):
        return []


def _identity() -> tuple[str, int]:
    job, restarts = slurm_job()
    if job is None:
        raise LaunchError(
            "this is not a Slurm job: SLURM_JOB_ID is not set; submit slurm/train.sbatch, which "
            "calls this command"
        )
    return job, restarts


def _require_no_secret(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a secret, which Slurm would show in the command of each rank."""
    for override, kept in zip(overrides, kept_overrides(overrides), strict=True):
        if override != kept:
            raise ConfigError(
                f"{override}: this address has a secret, and Slurm shows sbatch's command line to "
                f"others; export it as {VARIABLE_PREFIX}NAME before sbatch, and write "
                f"'${{{VARIABLE_PREFIX}NAME}}' in its place"
            )


@click.group(cls=CommandGroup)
def main() -> None:
    """Steps of slurm/ranks.sh before and after the ranks."""


@main.command(cls=WorkCommand)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--save-before", hidden=True, expose_value=False)  # of the ranks
@click.option("--needs-model", is_flag=True, help="Refuse a config without init_from.")
def begin(config: Path, overrides: tuple[str, ...], needs_model: bool) -> None:
    """Refuse a run of CONFIG and OVERRIDES that cannot work, and record its job in the history."""
    from megaback import __version__

    job, restarts = _identity()
    _require_no_secret(overrides)
    settings = load_config(config, overrides)
    if needs_model and settings.init_from is None:
        raise ConfigError(
            f"{config} has no init_from; give init_from=MODEL (a run, a checkpoint, or a folder "
            "that `megaback convert` wrote), or use slurm/train.sbatch to train from scratch"
        )
    num_ranks = int(os.environ.get("SLURM_NTASKS", "1"))
    begin_job(settings, job, restarts, requeue_limit(), num_ranks, config)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    again = f", start {restarts + 1}" if restarts else ""
    click.echo(f"slurm: megaback {__version__}, {num_ranks} ranks on {nodes}{again}")


@main.command(cls=WorkCommand)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--save-before", hidden=True, expose_value=False)
@click.option(
    "--step-code", type=EXIT_CODE.option, required=True, help="Exit code that srun returned."
)
@click.option(
    "--limit-is-near", is_flag=True, help="Set when USR1 was received, or the time limit is near."
)
def end(config: Path, overrides: tuple[str, ...], step_code: int, limit_is_near: bool) -> None:
    """Report how the ranks of CONFIG and OVERRIDES ended, requeue if useful, exit as they did."""
    job, restarts = _identity()
    settings = load_config(config, overrides)
    if has_newer_start(settings.run, job, restarts):
        click.echo(f"slurm: start {restarts + 1} of this job has ended, and a newer one has begun")
        raise SystemExit(SupersededError.exit_code)
    code = true_code(settings.run, job, step_code)
    if code:
        ending = read_exit(settings.run)
        of_srun = "" if code == step_code else f" (srun: {step_code})"
        cause = f": {ending['reason']}" if ending is not None and ending["code"] == code else ""
        click.echo(f"slurm: the ranks ended with code {code}{of_srun}{cause}")
    bad_nodes = nodes_to_replace(settings.run)
    is_wanted, sentence = why_requeue(
        settings.run, job, restarts, requeue_limit(), code, limit_is_near, bad_nodes
    )
    found = find_job(job) if is_wanted else None
    if found is not None and found.state != "RUNNING":
        click.echo(f"slurm: Slurm itself ends the job ({found.state.lower()}): not requeued")
    elif sentence:
        click.echo(f"slurm: {sentence}")
        if is_wanted:
            reason = _requeue(job, [*bad_nodes, *(found.excluded if found is not None else ())])
            if reason:
                click.echo(f"slurm: the requeue failed ({reason}); submit the job again to resume")
    raise SystemExit(code)


def _requeue(job: str, excluded: Sequence[str]) -> str | None:
    """Requeue the job, without the excluded nodes. Returns Slurm's error message, or None."""
    commands = [["scontrol", "requeue", job]]
    if excluded:
        # The nodes of a running job cannot be changed, and requeuing it ends this process.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        nodes = ",".join(dict.fromkeys(excluded))
        commands = [
            ["scontrol", "requeuehold", job],
            ["scontrol", "update", f"jobid={job}", f"ExcNodeList={nodes}"],
            ["scontrol", "release", job],
        ]
    for command in commands:
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "scontrol is not installed"
        if asked.returncode:
            return " ".join((asked.stdout + asked.stderr).split())
    return None


if __name__ == "__main__":
    main()
