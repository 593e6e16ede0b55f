"""`megaback rollback`: returns to an earlier checkpoint, and skips the steps since then.

Newer checkpoints and their copies in `checkpoint.copy_to` are moved aside. The steps up to the last
one are skipped on resume: weights are not updated; the learning rate schedule still advances.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipeline.common.atomic import write_text
from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.next_command import command, override, show_next
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.errors import CheckpointMissingError, LaunchError
from megaback.config_file import load_config
from megaback.faults.exit_record import record_event
from megaback.faults.run_lock import lock_run, release_lock
from megaback.faults.run_ownership import config_of_run, require_own_checkpoints
from megaback.faults.run_state import ROLLBACK_EVENT
from megaback.faults.start_fence import begin_start

if TYPE_CHECKING:
    from megaback.checkpoints.remote_copy import CopyTarget


def roll_back(run: Path, steps: int) -> tuple[Path, int, int]:
    """Roll a run back by at least `steps` steps.

    Returns the checkpoint from which it resumes, and the first and last step that are skipped.
    Raises CheckpointMissingError, CheckpointCorruptError, LaunchError while it is training, and
    StorageError if its copies cannot be rolled back.
    """
    from megaback.checkpoints.checkpoint import read_meta, verify_files
    from megaback.faults.step_guard import with_range, write_skipped_steps
    from megaback.run_folder import (
        CHECKPOINTS_FOLDER,
        LATEST_NAME,
        METRICS_NAME,
        ROLLED_BACK_PREFIX,
        complete_checkpoints,
        step_of,
    )
    from megaback.tracking.metrics import read_metrics

    require_own_checkpoints(run)
    complete = complete_checkpoints(run)
    if not complete or not (run / METRICS_NAME).is_file():
        raise CheckpointMissingError(
            f"{run} is not a run with a complete checkpoint; give its folder"
        )
    lock = lock_run(run)
    if lock is None:
        raise LaunchError(f"{run} is training; stop it first (SIGTERM saves), then roll back")
    with ExitStack() as stack:
        stack.callback(release_lock, lock)
        last = max((line["step"] for line in read_metrics(run)), default=0)
        earlier = [target for target in complete if step_of(target) <= last - steps]
        if not earlier:
            oldest = step_of(complete[0])
            raise CheckpointMissingError(
                f"{run} is at step {last}, and its oldest checkpoint is of step {oldest}: roll "
                f"back at most {last - oldest} steps; keep more checkpoints with "
                "checkpoint.keep_last or checkpoint.keep_every_steps"
            )
        target = earlier[-1]
        meta = read_meta(target)
        verify_files(target, meta)
        skipped_steps = with_range(run, meta.step + 1, last)
        aside = run / CHECKPOINTS_FOLDER / f"{ROLLED_BACK_PREFIX}{last:08d}"
        if (place := _copy_target(run)) is not None:
            place.roll_back(meta.step, skipped_steps, aside.name)
        begin_start(run)  # a rank that lives on, cut off from the network, writes nothing more
        # From here on, a kill leaves checkpoints of excluded steps in place; running the same
        # command again moves them.
        write_skipped_steps(run, skipped_steps)
        while aside.exists():
            aside = aside.with_name(aside.name + "-again")
        aside.mkdir()
        for newer in complete[complete.index(target) + 1 :]:
            os.replace(newer, aside / newer.name)
        write_text(target.parent / LATEST_NAME, target.name + "\n")
        record_event(run, ROLLBACK_EVENT, step=meta.step, excluded=[meta.step + 1, last])
    return target, meta.step + 1, last


def _copy_target(run: Path) -> "CopyTarget | None":
    """Target of the run's `checkpoint.copy_to`, if it has one."""
    from megaback.checkpoints.remote_copy import CopyTarget

    path = config_of_run(run)
    if not path.is_file():
        return None
    copy_to = load_config(path).checkpoint.copy_to
    return CopyTarget(copy_to, run) if copy_to is not None else None


@click.command(
    cls=WorkCommand,
    name="rollback",
    epilog=examples(
        "megaback rollback runs/xcoax_100bt --steps 200",
        "megaback rollback runs/xcoax_100bt --steps 1",
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--steps", required=True, type=COUNT.option, help="Minimum number of steps to roll back."
)
def main(run: Path, steps: int) -> None:
    """Roll RUN back to the newest checkpoint at least --steps steps back.

    On resume, the steps since are skipped with their data. Newer checkpoints are moved to
    RUN/checkpoints/rolled-back-from-STEP, not deleted. The run must be stopped.
    """
    target, first, last = roll_back(run, steps)
    click.echo(f"{run} resumes from {target.name}, and skips steps {first} to {last}")
    click.echo("newer checkpoints were moved to its folder checkpoints/rolled-back-…")
    show_next({command("train", config_of_run(run), override("run", run)): ""})


if __name__ == "__main__":
    main()
