"""`megaback submit`: check a run against its allocation, and queue it on Slurm.

An invalid run is refused before it waits in a queue. A snapshot of the submission is kept in the
run's folder, and the job reads it. The jobs are the shipped sbatch files; options here override
their #SBATCH lines on sbatch's command line.
"""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.next_command import command, show_next
from data_pipeline.common.number_ranges import MANY, SOURCE_WEIGHT
from data_pipeline.common.source_type import SOURCE
from data_pipeline.errors import ConfigError, LaunchError
from launcher.slurm.branch_jobs import RunJobs, after, branch_jobs, queue_tree
from launcher.slurm.commands import Submission, find_job, is_unreachable, run_sbatch
from launcher.slurm.job_request import JobRequest, job_options
from launcher.slurm.sbatch_files import SHARED_FILES, require_file, sbatch_value
from launcher.slurm.snapshot import new_folder
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
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="data: path to the tokenizer.model or tokenizer.json.",
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
    data.shards, and each job starts when the previous one has finished. With optimizer.decay_at,
    the branch of each horizon has jobs of its own, which follow the training job.
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

    def of_run(config: Config, folder: Path, model: Path | None) -> dict[str, Submission]:
        """The jobs that train a run and convert it, by stage."""
        file, copy = request.file_of(config), folder / CONFIG_COPY_NAME
        limit = request.max_requeues
        jobs = {"train": train_stage(config, file, copy, allocation, resources, limit)}
        if "convert" in stages:
            model = check_model_folder(model)
            jobs["convert"] = convert_stage(config, paths["convert"], model, resources)
        return jobs

    def of_branch(config: Config, folder: Path, name: str) -> list[Submission]:
        model = None if out is None else out.with_name(f"{out.name}-{name}")
        return list(of_run(config, folder, model).values())

    submissions = of_run(settings, snapshot, out)
    branches = branch_jobs(settings, of_branch)
    if not force:
        for branch in branches:
            require_no_job(branch.config.run)
    unasked = try_out(list(submissions.values()), may_be_away=dry_run)
    if "data" in stages:
        cpus = int(sbatch_value(paths["data"], "cpus-per-task") or 1)
        plan = plan_data(settings, sources, weights, tokenizer, tasks, cpus, dry_run)
        submissions["data"] = data_stage(settings, paths["data"], plan, resources)
        unasked = unasked or try_out([submissions["data"]], may_be_away=dry_run)
    trunk = RunJobs(settings, snapshot, tuple(submissions[stage] for stage in stages))
    click.echo(f"# {room}" if dry_run else room)
    if dry_run:
        return _show(trunk, branches, unasked)
    shared = [request.folder / name for name in SHARED_FILES]
    jobs = queue_tree(trunk, branches, shared)
    return _report(trunk, branches, allocation, jobs)


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


def _show(trunk: RunJobs, branches: Sequence[RunJobs], unasked: str) -> None:
    verdict = f"not tested by Slurm, since {unasked}" if unasked else "accepted by Slurm"
    before = ""
    for submission in trunk.submissions:
        stage = submission.stage
        linked = after(submission, before) if before else submission
        before = f"JOB_OF_{stage.upper()}"
        click.echo(f"# {stage}: {verdict}. The command, and the script:")
        click.echo(f"{trunk.from_snapshot(linked).line}\n")
        click.echo(Path(submission.file).read_text(encoding="utf-8"))
    for branch in branches:
        before = "JOB_OF_TRAIN"
        for submission in branch.submissions:
            linked = after(submission, before)
            before = f"JOB_OF_{branch.config.run.name.upper()}"
            click.echo(f"# {submission.stage} of {branch.config.run}:")
            click.echo(f"{branch.from_snapshot(linked).line}\n")
    click.echo("# nothing was written or queued")


def _report(
    trunk: RunJobs,
    branches: Sequence[RunJobs],
    allocation: Allocation,
    queued: Sequence[Sequence[str]],
) -> None:
    shape = f", {allocation.nodes} nodes x {allocation.ranks_per_node} ranks"
    for run, jobs in zip((trunk, *branches), queued, strict=True):
        of_branch = "" if run is trunk else f" of branch {run.config.run.name}"
        for submission, job in zip(run.submissions, jobs, strict=True):
            stage = submission.stage
            click.echo(f"{stage}{of_branch}: job {job}{shape if stage == 'train' else ''}")
    click.echo(f"snapshot: {trunk.snapshot}")
    stages = [submission.stage for submission in trunk.submissions]
    folder = trunk.config.run
    log = shlex.quote(f"{folder}/{LOGS_FOLDER}/train-{queued[0][stages.index('train')]}.out")
    ids = " ".join(job for jobs in queued for job in jobs)
    lines = {
        command("jobs", folder): "its progress",
        f"tail -F {log}": "its log",
        f"scancel {ids}": "cancels it; training saves first",
    }
    show_next(lines)


if __name__ == "__main__":
    main()
