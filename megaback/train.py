"""Process of a rank: `python -m megaback.train CONFIG`, under a launcher, under srun or alone.

It joins the other ranks, trains (`training.trainer`), and exits with an exit code that it also
records in the run's folder.
"""

import os
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from data_pipeline.common.console import protect_console
    from megaback.environment import use_expandable_segments
    from megaback.faults.stop_request import exit_at_ctrl_c

    exit_at_ctrl_c()
    use_expandable_segments()
    protect_console()

import click

from data_pipeline.common.command import WorkCommand, examples, report
from data_pipeline.common.console import only_comments
from data_pipeline.common.device_memory import failed_allocation
from data_pipeline.common.driver_reports import print_exception
from data_pipeline.common.number_ranges import MANY_OR_ZERO
from data_pipeline.errors import (
    LaunchError,
    MegabackError,
    NonFiniteError,
    PreemptedError,
    StorageError,
    UserInterruptError,
)
from data_pipeline.redaction import scrub
from megaback.config import Config
from megaback.config_file import load_config
from megaback.distributed.determinism import use_deterministic_algorithms
from megaback.distributed.world import (
    CollectiveExit,
    World,
    end_rank,
    is_collective_error,
    only_first_reports,
    start_world,
)
from megaback.environment import use_flight_recorder
from megaback.faults.stop_request import StopRequest, deadline_of
from megaback.faults.watchdog import Watchdog
from megaback.installation import HIDDEN, is_whole
from megaback.run_folder import COLLECTIVES_FOLDER
from megaback.training.memory_state import record_memory_history, write_memory_state
from megaback.training.out_of_memory import device_memory_error
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.training.start import AlreadyTrained
from megaback.training.trainer import Trainer

TrainerMaker = Callable[[Run, World, StopRequest], Trainer]

_CONSOLE_TIMEOUT_S = 3.0
"""Maximum time that a step blocks on console output, in seconds; then the line is dropped."""


def train_run(
    config: Config,
    world: World,
    stop: StopRequest,
    watchdog: Watchdog,
    config_path: Path | None = None,
    make_trainer: TrainerMaker = Trainer,
) -> None:
    """Train a run, whose config is from `config_path`, to its end.

    Raises CollectiveExit on all ranks.
    """
    error: MegabackError | None = None
    reason = ""
    try:
        prepared = prepare_run(config, world, watchdog, config_path)
        if isinstance(prepared, AlreadyTrained):
            if world.is_first:
                click.echo(prepared.message)
            return
        if config.training.memory_history:
            record_memory_history(world.device)
        trainer = make_trainer(prepared, world, stop)
        try:
            reason = trainer.train()
        finally:
            watchdog.let_peers_end()
            trainer.close()
    except (NonFiniteError, PreemptedError, UserInterruptError) as shared:
        error = shared  # raised on all ranks
    world.stop_if_any(error)
    if world.is_first:
        watchdog.record_exit(0, "finished", reason)
    watchdog.mark_exited(reason)


def train_as_rank(
    config: Config,
    world: World,
    stop: StopRequest,
    config_path: Path,
    start_id: str | None = None,
    make_trainer: TrainerMaker = Trainer,
) -> int:
    """Train, and record in the run's folder how it ended. Returns the exit code."""
    watchdog = Watchdog(config.run, config.hardware, world, start_id)
    try:
        train_run(config, world, stop, watchdog, config_path, make_trainer)
    except CollectiveExit as ending:
        reason = ending.error
        if reason is not None and watchdog.is_open:  # otherwise an earlier start's record stays
            watchdog.record_exit(reason.exit_code, type(reason).__name__, str(reason))
        watchdog.mark_exited("all ranks ended together")
        return int(ending.code or 0)
    except Exception as fault:  # noqa: BLE001 (it is reported)
        # No collective is possible here: the other ranks read this rank's exit from its heartbeat.
        if is_collective_error(fault):
            os._exit(watchdog.report_lost().exit_code)
        failed = failed_allocation(fault)
        if failed is not None:
            error = device_memory_error(config, world, failed, _written(watchdog, world))
            if not watchdog.is_open or watchdog.record_exit(
                error.exit_code, type(error).__name__, str(error)
            ):
                report(error)  # only the first rank that records it
            watchdog.mark_exited(str(error))
            os._exit(error.exit_code)
        print_exception(type(fault), fault, fault.__traceback__)
        reason_text = scrub(f"{type(fault).__name__}: {' '.join(str(fault).split())}")
        if watchdog.is_open:
            watchdog.record_exit(MegabackError.exit_code, "Exception", reason_text)
        watchdog.mark_exited(reason_text)
        os._exit(MegabackError.exit_code)
    return 0


def _written(watchdog: Watchdog, world: World) -> list[Path]:
    """Files that this rank, which is out of memory, could write into the run's folder."""
    if not watchdog.is_open:
        return []
    try:
        folder = watchdog.folder()
    except StorageError:
        return []
    return write_memory_state(folder, world.rank, world.device, watchdog.fence.replace)


@click.command(
    cls=WorkCommand,
    name="train",
    epilog=examples(
        "deepspeed --module megaback.train configs/demo.yaml",
        "deepspeed --hostfile hosts --module megaback.train configs/demo.yaml run=runs/small",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--save-before", hidden=True)
@click.option("--start-id", hidden=True)
# Passed by the deepspeed command.
@click.option("--local_rank", type=MANY_OR_ZERO.option, hidden=True, expose_value=False)
def main(
    config: Path, overrides: tuple[str, ...], save_before: str | None, start_id: str | None
) -> None:
    """Train as one rank of a run described by CONFIG and key.sub=value OVERRIDES."""
    only_comments(_CONSOLE_TIMEOUT_S)
    with only_first_reports():
        if not is_whole():
            raise LaunchError(HIDDEN)
        stop = StopRequest(deadline_of(save_before))
        settings = load_config(config, overrides)
        if settings.training.deterministic:
            use_deterministic_algorithms(settings.hardware.device)
        use_flight_recorder(settings.run.resolve() / COLLECTIVES_FOLDER)
        world = start_world(settings.hardware.device, settings.hardware.collective_timeout_s)
    end_rank(train_as_rank(settings, world, stop, config, start_id))


if __name__ == "__main__":
    main()
