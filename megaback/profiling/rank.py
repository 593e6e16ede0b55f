"""Process of a rank that is profiled, or trains beside one that is.

`python -m megaback.profiling.rank CONFIG --out DIR`, under `megaback profile` or under srun. It is
a rank of `megaback.train`, of a short run whose folder is within DIR.
"""

import os
from pathlib import Path

if __name__ == "__main__":  # before torch is imported, which takes seconds
    from data_pipeline.common.console import protect_console
    from megaback.environment import use_expandable_segments
    from megaback.faults.stop_request import exit_at_ctrl_c

    os.dup2(2, 1)  # standard output is the command's
    exit_at_ctrl_c()
    use_expandable_segments()
    protect_console()

import click

from data_pipeline.common.command import WorkCommand, report, system_error
from data_pipeline.common.number_ranges import COUNT, MANY_OR_ZERO
from data_pipeline.errors import ConfigError
from megaback.distributed.world import World, end_rank, only_first_reports, start_world
from megaback.faults.stop_request import StopRequest
from megaback.profiling.report import DEFAULT_STEPS, WARMUP_STEPS, short_config
from megaback.profiling.trainer import ProfiledSteps, ProfiledTrainer
from megaback.train import train_as_rank
from megaback.training.run import Run


@click.command(cls=WorkCommand, name="rank")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the result.")
@click.option("--rank", "profiled_rank", type=MANY_OR_ZERO.option, default=0, help="Rank.")
@click.option("--steps", type=COUNT.option, default=DEFAULT_STEPS, help="Profiled steps.")
def main(
    config: Path, overrides: tuple[str, ...], out: Path, profiled_rank: int, steps: int
) -> None:
    """Train WARMUP_STEPS and some profiled steps, as one rank."""
    with only_first_reports():
        settings = short_config(config, overrides, out, steps)
        world = start_world(settings.hardware.device, settings.hardware.collective_timeout_s)
        if profiled_rank >= world.size:
            raise ConfigError(
                f"`rank` is {profiled_rank}, but there are {world.size} ranks, numbered from 0"
            )
    trainers: list[ProfiledTrainer] = []

    def trainer_of(run: Run, world: World, stop: StopRequest) -> ProfiledTrainer:
        profiled = ProfiledSteps(profiled_rank, WARMUP_STEPS, steps)
        trainers.append(ProfiledTrainer(run, world, stop, profiled, out))
        return trainers[-1]

    code = train_as_rank(settings, world, StopRequest(None), config, make_trainer=trainer_of)
    if not code and world.rank == profiled_rank:
        try:
            trainers[0].write()
        except OSError as problem:
            error = system_error(problem)
            report(error)
            os._exit(error.exit_code)
    end_rank(code)


if __name__ == "__main__":
    main()
