"""`megaback train`: starts the ranks of a run on this machine or on the hosts of a file.

An invalid run is refused before a rank starts; the ends of all ranks become one exit code.
"""

import time
from pathlib import Path

import click

from data_pipeline.common.atomic import new_id
from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.import_path import module_command
from data_pipeline.common.shared_options import hostfile_option, save_before_option
from data_pipeline.errors import MegabackError
from launcher.ranks.hostfile import read_hostfile, run_on_hosts
from launcher.ranks.local import (
    count_ranks,
    loss_grace_s,
    rank_environment,
    run_ranks,
    verdict,
)
from launcher.train_result import show_result
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.faults.exit_record import newest_start, read_exit, record_exit
from megaback.faults.run_ownership import require_run_folder
from megaback.faults.run_state import assess_run
from megaback.faults.stop_request import deadline_of
from megaback.tracking.run_progress import read_progress
from megaback.yaml_text import kept_overrides

_RANK_MODULE = "megaback.train"


@click.command(
    cls=WorkCommand,
    name="train",
    epilog=examples(
        "megaback train configs/demo.yaml",
        "megaback train configs/demo.yaml run=runs/small training.steps=200",
        "megaback train configs/xcoax_100bt.yaml --hostfile hosts --save-before 23h",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@save_before_option
@hostfile_option
def main(
    config: Path, overrides: tuple[str, ...], save_before: str | None, hostfile: Path | None
) -> None:
    """Train the run that CONFIG describes, with key.sub=value OVERRIDES.

    Starts one rank per device of this machine, or of the hosts of --hostfile. Run the same command
    again to resume from the newest checkpoint. docs/reference/config.md lists all keys.
    """
    started = time.monotonic()
    code = train(config, overrides, save_before, hostfile)
    if not code:
        show_result(load_config(config, overrides), time.monotonic() - started)
    raise SystemExit(code)


def train(
    config: Path,
    overrides: tuple[str, ...],
    save_before: str | None = None,
    hostfile: Path | None = None,
) -> int:
    """Start the ranks of a run and wait for them. Returns the exit code.

    Raises errors that prevent a start, and those of ranks that ended without a reason.
    """
    overrides = kept_overrides(overrides)
    settings = load_config(config, overrides)
    deadline_of(save_before)
    processes = count_ranks(settings)
    hosts = None if hostfile is None else read_hostfile(hostfile)
    if hosts is not None:
        processes = sum(host.slots for host in hosts)
    require_run_folder(settings, config)
    open_data(settings, 0, processes)
    start_id = new_id()
    command = module_command(_RANK_MODULE, str(config), *overrides, "--start-id", start_id)
    if save_before is not None:
        command += ["--save-before", save_before]
    names: list[str] = []
    grace_s = loss_grace_s(settings)
    if hosts is None:
        environment = rank_environment(processes)
        codes, signals = run_ranks(command, environment, processes, grace_s)
    else:
        codes, names, signals = run_on_hosts(hosts, command, grace_s)
    # The record is of another start if this one was refused, had nothing to do or is superseded.
    newest = newest_start(settings.run)
    has_started = newest is not None and newest.get("start") == start_id
    try:
        ending = read_exit(settings.run) if has_started else None
        has_trained = has_started and _has_trained(settings.run)
        last_seen = _dead_ranks(settings.run) if has_started and any(codes) else ""
        return verdict(codes, signals, ending, names, has_trained=has_trained, last_seen=last_seen)
    except MegabackError as error:
        if has_started:
            kind = type(error).__name__
            record_exit(settings.run, error.exit_code, kind, str(error), start=start_id)
        raise


def _dead_ranks(run: Path) -> str:
    """Names of ranks that ended without a record, with their last phases; empty if none did."""
    state = assess_run(run, (), time.time())
    return state.reason if state.state == "dead" else ""


def _has_trained(run: Path) -> bool:
    """Whether the newest start has taken a step."""
    progress = read_progress(run)
    start = newest_start(run)
    return progress is not None and start is not None and progress.step > start.get("step", 0)


if __name__ == "__main__":
    main()
