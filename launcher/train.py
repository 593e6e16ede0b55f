"""`megaback train`: starts the ranks of a run on this machine or on the hosts of a file.

An invalid run is refused before a rank starts; the ends of all ranks become one exit code.
"""

import time
from pathlib import Path

import click

from data_pipeline.common.atomic import new_id
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.import_path import module_command
from data_pipeline.common.shared_options import hostfile_option, save_before_option
from data_pipeline.common.terminal import echo
from data_pipeline.errors import MegabackError
from launcher.ranks.hostfile import read_hostfile, run_on_hosts
from launcher.ranks.local import (
    count_ranks,
    loss_grace_s,
    rank_environment,
    run_ranks,
    verdict,
)
from launcher.train_result import show_branches, show_result
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.faults.exit_record import newest_start, read_exit, record_exit
from megaback.faults.rolled_back_branches import require_no_rolled_back_branch
from megaback.faults.run_ownership import require_run_folder
from megaback.faults.run_state import assess_run
from megaback.faults.stop_request import deadline_of, local_time_of
from megaback.horizons import branch_overrides, horizons_of, require_branch_points
from megaback.run_folder import META_NAME, complete_checkpoints, newest_checkpoint_step
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

    Starts one rank per device of this machine, or of the hosts of --hostfile, and then the branches
    of optimizer.decay_at. Run the same command again to resume from the newest checkpoint.
    docs/reference/config.md lists all keys.
    """
    started = time.monotonic()
    code, runs = train_with_branches(config, overrides, save_before, hostfile)
    if not code:
        show_branches(runs[1:])
        show_result(runs[-1], time.monotonic() - started)
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


def train_with_branches(
    config: Path,
    overrides: tuple[str, ...],
    save_before: str | None = None,
    hostfile: Path | None = None,
) -> tuple[int, list[Config]]:
    """Train a run, and the branches of its horizons if it has any, one after another.

    Returns the first exit code that is not 0, or 0, and the configs of the trained runs. Raises the
    errors of `train`, and ConfigError for a horizon that its trunk is past.
    """
    settings = load_config(config, overrides)
    horizons = horizons_of(settings)
    require_branch_points(settings)
    require_no_rolled_back_branch(settings)
    save_before = local_time_of(save_before)  # a duration is that of all runs together
    runs = [overrides, *((*overrides, *branch_overrides(settings, one)) for one in horizons)]
    loaded: list[Config] = []
    for number, words in enumerate(runs):
        loaded.append(load_config(config, words))
        run = loaded[-1].run
        if horizons:
            what = f"horizon {horizons[number - 1].name}" if number else "trunk"
            echo(f"{what} ({number + 1} of {len(runs)}): {run}")
            if _is_finished(loaded[-1]):
                echo(f"it has done its {loaded[-1].training.steps:,} steps")
                continue
        code = train(config, words, save_before, hostfile)
        if code:
            return code, loaded
    return 0, loaded


def _is_finished(settings: Config) -> bool:
    """Whether a run of exactly this config has trained to its end; its folder may have moved.

    With any other key its ranks are started, which refuse the config, or do nothing.
    """
    ending = read_exit(settings.run)
    steps = settings.training.steps or 0
    has_ended = ending is not None and ending.get("code") == 0
    if not has_ended or newest_checkpoint_step(settings.run) < steps:
        return False
    now = settings.model_dump(mode="json")
    try:
        saved = read_json(complete_checkpoints(settings.run)[-1] / META_NAME)["config"]
        return all(saved[key] == now[key] for key in now.keys() - {"run", "branch_from"})
    except (IndexError, KeyError, TypeError, ValueError, OSError):
        return False  # the ranks report it


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
