"""`megaback sweep`: runs of one config with lists of values, and their comparison."""

import json
from dataclasses import fields
from pathlib import Path

import click
from click.core import ParameterSource

from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.figures import require_matplotlib, write_picture
from data_pipeline.common.next_command import command as command_line
from data_pipeline.common.next_command import show_next
from data_pipeline.common.number_ranges import MANY, SOME_SHARE
from data_pipeline.common.output_paths import is_our_picture, require_output
from data_pipeline.common.rich_console import SafeConsole
from data_pipeline.common.shared_options import hostfile_option, json_option, save_before_option
from data_pipeline.common.terminal import echo, print_table
from data_pipeline.errors import ConfigError
from launcher.slurm.array import RunArray
from launcher.slurm.job_request import JobRequest, job_options
from megaback.faults.stop_request import local_time_of
from megaback.planning.plan import DEFAULT_MFU
from tools.sweeps.cost import cost_lines
from tools.sweeps.figure import horizontal_key, sweep_figure
from tools.sweeps.plan import SweepPlan
from tools.sweeps.record import PICTURE_NAME, RECORD_NAME, Record, require_record
from tools.sweeps.result import SweepResult, result_of
from tools.sweeps.table import summary, sweep_table
from tools.sweeps.training import require_trainable, train_all

_OF_SLURM = {"max_running", *(field.name for field in fields(JobRequest))}
_OF_THIS_MACHINE = {"save_before", "hostfile"}


def report_result(record: Record, result: SweepResult, out: Path, x_axis: str | None) -> None:
    """Write the result, and print its table and the runs that need attention."""
    record.write(out, result.to_json())
    write_picture(sweep_figure(result, x_axis), out / PICTURE_NAME, overwrite=True)
    print_table(SafeConsole(), sweep_table(result))
    for run in result.runs:
        if run.reason is not None:
            echo(f"{run.name}: {run.state}: {run.reason}")
    echo(summary(result))
    click.echo(f"{out / RECORD_NAME}\n{out / PICTURE_NAME}")


def queue_runs(plan: SweepPlan, array: RunArray) -> None:
    """Queue the array, and print how to follow its runs."""
    plan.record.write(plan.out, result_of(plan.record, plan.out).to_json())
    job = array.queue()
    click.echo(f"job {job}: an array of {len(array.configs)} runs")
    show_next(
        {
            command_line("jobs", plan.out): "their progress",
            command_line("sweep", plan.out): "their losses",
            f"scancel {job}": "cancels them; each saves first",
        }
    )


def show_sweep(out: Path, x_axis: str | None, as_json: bool) -> None:
    """Print the result of the sweep in a folder, finished or not."""
    record = require_record(out)
    result = result_of(record, out)
    horizontal_key(result, x_axis)
    if as_json:
        return click.echo(json.dumps(result.to_json()))
    require_picture(out)
    return report_result(record, result, out, x_axis)


def require_picture(out: Path) -> None:
    """Require that the figure can be drawn, and written to the folder of the sweep."""
    require_matplotlib("megaback sweep")
    require_output(out / PICTURE_NAME, is_ours=is_our_picture, overwrite=True, option="--out")


def _require_fitting(slurm: bool) -> None:
    """Raises ConfigError for an option of Slurm without --slurm, or of this machine with it."""
    context = click.get_current_context()
    others = _OF_THIS_MACHINE if slurm else _OF_SLURM
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in others and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = max(parameter.opts, key=len)
            what = "is for runs on this machine; remove --slurm" if slurm else "needs --slurm"
            raise ConfigError(f"{option} {what}")


@click.command(
    cls=ResumableCommand,
    name="sweep",
    epilog=examples(
        "megaback sweep configs/arrow.yaml optimizer.learning_rate=3e-3,6e-3,1.2e-2 "
        "training.seed=0,1,2 --dry-run",
        "megaback sweep configs/arrow.yaml model.width=64,128 model.num_heads=1,2 "
        "optimizer.learning_rate=3e-3,6e-3 --zip model.width,model.num_heads",
        "megaback sweep configs/xcoax_100bt.yaml optimizer.learning_rate=1e-4,3e-4 --slurm "
        "--nodes 4",
        "megaback sweep runs/arrow-sweep",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--zip",
    "zipped",
    metavar="KEY,KEY,...",
    multiple=True,
    help="Keys whose values are taken together, the first of each with the first of the others, "
    "instead of in all combinations. May be repeated.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the sweep. Default: the config's run, with -sweep added.",
)
@click.option(
    "--x-axis",
    metavar="KEY",
    help="Key of the figure's horizontal axis. Default: the learning rate, or the first key of "
    "numbers.",
)
@click.option("--dry-run", is_flag=True, help="List the runs and their cost, and start none.")
@click.option(
    "--mfu",
    type=SOME_SHARE.option,
    default=DEFAULT_MFU,
    show_default=True,
    help="Model FLOPs utilization that the device-hours of --dry-run assume.",
)
@click.option("--slurm", is_flag=True, help="Queue the runs as one array of Slurm jobs.")
@click.option(
    "--max-running", type=MANY.option, help="Maximum number of runs of the array at a time."
)
@job_options
@save_before_option
@hostfile_option
@json_option
def main(
    config: Path,
    overrides: tuple[str, ...],
    zipped: tuple[str, ...],
    out: Path | None,
    x_axis: str | None,
    dry_run: bool,
    mfu: float,
    slurm: bool,
    max_running: int | None,
    request: JobRequest,
    save_before: str | None,
    hostfile: Path | None,
    as_json: bool,
) -> None:
    """Train the runs of CONFIG for all combinations of values, and compare their losses.

    Each of OVERRIDES is key.sub=value, or key.sub=value,value,... for a list of values to compare.
    A comma within brackets, braces or quotes does not separate values: 'data.shards=[a,b],[c]' has
    two. With several values of training.seed, losses are means over seeds with a standard error.

    Runs are trained one after the other, each in a folder below --out named by its values. A run
    that fails is reported, and does not end the sweep; one that diverges is a result. Run the same
    command again to resume and to retry, or with more values to add runs. With the folder of a
    sweep for CONFIG, show its result so far.

    The result is in sweep.json and sweep.png. docs/sweeps.md has details.
    """
    _require_fitting(slurm)
    if config.is_dir() and not overrides:
        return show_sweep(config, x_axis, as_json)
    if as_json:
        raise ConfigError(
            "--json shows a sweep that was started; give its folder in place of a config"
        )
    plan = SweepPlan.of(config, overrides, zipped, out)
    require_picture(plan.out)
    before = result_of(plan.record, plan.out)
    horizontal_key(before, x_axis)
    states = {run.name: run for run in before.runs}
    left = [run for run in plan.runs if not states[run.name].is_over]
    array = RunArray(plan.out, [run.config for run in left], request, max_running)
    room = array.check(config, may_be_away=dry_run) if slurm and left else ""
    if not slurm:
        require_trainable(config, left, hostfile)
    if dry_run:
        known = [states[run.name] for run in plan.runs]
        click.echo("\n".join(cost_lines(plan.runs, known, mfu)))
        if room:
            click.echo(f"{room}\n{array.line}")
        return click.echo("nothing was written or started")
    if slurm and left:
        click.echo(room)
        return queue_runs(plan, array)
    code = train_all(config, plan, local_time_of(save_before), hostfile)
    report_result(plan.record, result_of(plan.record, plan.out), plan.out, x_axis)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
