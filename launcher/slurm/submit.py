"""`megaback submit`: check a run against its allocation, and queue it on Slurm.

An invalid run is refused before it waits in a queue. A snapshot of the submission is kept in the
run's folder, and the job reads it. The jobs are the shipped sbatch files; options here override
their #SBATCH lines on sbatch's command line.
"""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.interrupts import signals_deferred
from data_pipeline.common.next_command import command, show_next
from data_pipeline.common.number_ranges import MANY, SOURCE_WEIGHT
from data_pipeline.common.source_type import SOURCE
from data_pipeline.errors import ConfigError, LaunchError
from launcher.slurm.commands import (
    Submission,
    cancel,
    find_job,
    is_unreachable,
    queue,
    run_sbatch,
)
from launcher.slurm.job_request import JobRequest, job_options
from launcher.slurm.sbatch_files import SHARED_FILES, require_file, sbatch_value
from launcher.slurm.snapshot import new_folder, record_jobs, remove_snapshot, write_snapshot
from launcher.slurm.stages import (
    Allocation,
    check_model_folder,
    convert_stage,
    data_stage,
    parse_chain,
    plan_data,
    train_file,
    train_stage,
)
from megaback.config import Config
from megaback.config_file import load_config
from megaback.faults.run_ownership import require_run_folder
from megaback.run_folder import CONFIG_COPY_NAME, LOGS_FOLDER
from megaback.tracking.run_progress import jobs_of

_SBATCH_FILES = {"data": "build_shards.sbatch", "convert": "convert.sbatch"}
_MAX_JOBS = 20


def require_no_job(run: Path) -> None:
    """Require that no job of a run is pending or running. Raises LaunchError."""
    for job, stage in list(jobs_of(run).items())[-_MAX_JOBS:]:
        found = find_job(job)
        if found is not None and not found.is_over:
            raise LaunchError(
                f"{run} already has job {job} ({stage}, {found.state.lower()}); wait for it, "
                f"cancel it with `scancel {job}`, or submit anyway with --force"
            )


def queue_all(
    config: Config, folder: Path, submissions: Sequence[Submission], files: Sequence[Path]
) -> list[str]:
    """Make the snapshot and queue the jobs, each after the one before. Returns their ids.

    Raises LaunchError, and then leaves no job and no snapshot behind.
    """
    fields = write_snapshot(folder, config, files)
    jobs: list[str] = []
    recorded: list[dict[str, str]] = []
    try:
        for submission in submissions:
            linked = after(submission, jobs[-1]) if jobs else submission
            with signals_deferred():  # so that a queued job's id is known
                jobs.append(queue(linked))
            recorded.append({"stage": linked.stage, "job": jobs[-1], "line": linked.line})
            record_jobs(folder, fields, recorded)
    except BaseException:
        for job in jobs:
            cancel(job)
        remove_snapshot(folder)
        raise
    return jobs


def after(submission: Submission, job: str) -> Submission:
    """A submission that starts after another job has succeeded, and is canceled if that fails."""
    link = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    return replace(submission, options=(*submission.options, *link))


@click.command(
    cls=WorkCommand,
    name="submit",
    epilog=examples(
        "megaback submit configs/xcoax_100bt.yaml --nodes 4",
        "megaback submit configs/xcoax_100bt.yaml --nodes 4 --time 24:00:00 --dry-run",
        "megaback submit configs/xcoax_100bt.yaml --chain data,train,convert --source "
        "hf:HuggingFaceFW/fineweb:sample-100BT --tokenizer "
        "data/tokenizer/tokenizer.model --out models/xcoax",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@job_options
@click.option("--cpu-partition", help="Slurm partition of the data and convert jobs.")
@click.option(
    "--chain",
    default="train",
    show_default=True,
    help="Jobs to queue: data, train and convert, or some of them, separated by commas.",
)
@click.option(
    "--source",
    "sources",
    type=SOURCE,
    multiple=True,
    help="data: source to build from. May be repeated.",
)
@click.option(
    "--weight",
    "weights",
    type=SOURCE_WEIGHT.option,
    multiple=True,
    help="data: number of times that each document of a --source is used; one per --source, in the "
    "same order. Default: 1.",
)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="data: path to the tokenizer.model."
)
@click.option(
    "--tasks",
    type=MANY.option,
    help="data: number of tasks to split the input into. Default: by its size.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="convert: folder to write the model to."
)
@click.option(
    "--force", is_flag=True, help="Submit even if a job of this run is pending or running."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the run and print the commands and scripts, without submitting.",
)
def main(
    config: Path,
    overrides: tuple[str, ...],
    request: JobRequest,
    cpu_partition: str | None,
    chain: str,
    sources: tuple[str, ...],
    weights: tuple[float, ...],
    tokenizer: Path | None,
    tasks: int | None,
    out: Path | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Queue the run that CONFIG describes, with key.sub=value OVERRIDES, on a Slurm cluster.

    --chain data,train,convert queues all jobs from text to model: shards are built in
    data.shards, and each job starts when the previous one has finished.
    """
    settings = load_config(config, overrides)
    stages = parse_chain(chain)
    _require_used(stages, "data", source=sources, weight=weights, tokenizer=tokenizer, tasks=tasks)
    _require_used(stages, "convert", out=out)
    resources = request.resources(cpu_partition)
    names = {**_SBATCH_FILES, "train": train_file(settings)}
    paths = {stage: require_file(request.folder, names[stage]) for stage in stages}
    allocation = request.allocation_of(settings)
    require_run_folder(settings, config)
    room = request.check(settings, builds_data="data" in stages)
    if not force:
        require_no_job(settings.run)

    snapshot = new_folder(settings.run)
    submissions = {
        "train": train_stage(
            settings,
            paths["train"],
            snapshot / CONFIG_COPY_NAME,
            allocation,
            resources,
            request.max_requeues,
        )
    }
    if "convert" in stages:
        submissions["convert"] = convert_stage(
            settings, paths["convert"], check_model_folder(out), resources
        )
    unasked = try_out(list(submissions.values()), may_be_away=dry_run)
    if "data" in stages:
        cpus = int(sbatch_value(paths["data"], "cpus-per-task") or 1)
        plan = plan_data(settings, sources, weights, tokenizer, tasks, cpus, dry_run)
        submissions["data"] = data_stage(settings, paths["data"], plan, resources)
        unasked = unasked or try_out([submissions["data"]], may_be_away=dry_run)
    # The job runs the copy in the snapshot, with the shared files beside it.
    queued = [
        replace(submissions[stage], file=str(snapshot / paths[stage].name)) for stage in stages
    ]
    click.echo(f"# {room}" if dry_run else room)
    if dry_run:
        return _show(queued, list(paths.values()), unasked)
    copied = [*paths.values(), *(request.folder / name for name in SHARED_FILES)]
    jobs = queue_all(settings, snapshot, queued, copied)
    return _report(settings, allocation, dict(zip(stages, jobs, strict=True)), snapshot)


def try_out(submissions: Sequence[Submission], *, may_be_away: bool) -> str:
    """Have Slurm test the submissions. Returns why it could not, if it `may_be_away` and is."""
    if may_be_away and shutil.which("sbatch") is None:
        return "sbatch is not installed"
    try:
        for submission in submissions:
            run_sbatch(submission, "--test-only")
    except LaunchError as error:
        if may_be_away and is_unreachable(str(error)):
            return "no Slurm controller can be reached"
        raise
    return ""


def _require_used(stages: Sequence[str], stage: str, **given: object) -> None:
    for name, value in given.items():
        if value and stage not in stages:
            raise ConfigError(
                f"--{name} is for the stage {stage}, which is not in --chain {','.join(stages)}"
            )


def _show(submissions: Sequence[Submission], paths: Sequence[Path], unasked: str) -> None:
    verdict = f"not tested by Slurm, since {unasked}" if unasked else "accepted by Slurm"
    before = ""
    for submission, path in zip(submissions, paths, strict=True):
        linked = after(submission, before) if before else submission
        before = f"JOB_OF_{submission.stage.upper()}"
        click.echo(f"# {submission.stage}: {verdict}. The command, and the script:")
        click.echo(f"{linked.line}\n")
        click.echo(path.read_text(encoding="utf-8"))
    click.echo("# nothing was written or queued")


def _report(config: Config, allocation: Allocation, jobs: dict[str, str], snapshot: Path) -> None:
    for stage, job in jobs.items():
        shape = (
            f", {allocation.nodes} nodes x {allocation.ranks_per_node} ranks"
            if stage == "train"
            else ""
        )
        click.echo(f"{stage}: job {job}{shape}")
    click.echo(f"snapshot: {snapshot}")
    log = shlex.quote(f"{config.run}/{LOGS_FOLDER}/train-{jobs['train']}.out")
    lines = {
        command("jobs", config.run): "its progress",
        f"tail -F {log}": "its log",
        f"scancel {' '.join(jobs.values())}": "cancels it; training saves first",
    }
    show_next(lines)


if __name__ == "__main__":
    main()
