"""Options of a training job on Slurm, which commands that queue runs share, and their checks."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.number_ranges import MANY, MANY_OR_ZERO
from data_pipeline.errors import ConfigError
from launcher.memory_check import check_memory
from launcher.slurm.sbatch_files import require_file, sbatch_value, shipped_folder
from launcher.slurm.stages import Allocation, Resources, check_run, choose_allocation, train_file
from megaback.config import Config


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """Request for a training job by a command's options; None keeps the sbatch file's value."""

    nodes: int
    devices_per_node: int | None
    uses_gpus: bool | None
    device_name: str | None
    cpus_per_task: int | None
    mem: str | None
    time: str | None
    partition: str | None
    account: str | None
    more: tuple[str, ...]
    max_requeues: int | None
    files: Path | None

    @property
    def folder(self) -> Path:
        """Folder of the sbatch files. Raises LaunchError."""
        return self.files or shipped_folder()

    def file_of(self, config: Config) -> Path:
        """The sbatch file that trains a config. Raises LaunchError."""
        return require_file(self.folder, train_file(config))

    def allocation_of(self, config: Config) -> Allocation:
        """Nodes and ranks of a config's job. Raises ConfigError, LaunchError."""
        file = self.file_of(config)
        return choose_allocation(config, file, self.nodes, self.devices_per_node, self.uses_gpus)

    def resources(self, cpu_partition: str | None = None) -> Resources:
        """The other resources. Raises ConfigError."""
        if wrong := [option for option in self.more if not option.startswith("--")]:
            raise ConfigError(
                f"--sbatch-option {wrong[0]!r} does not begin with --; write --qos=high"
            )
        return Resources(
            cpus_per_task=self.cpus_per_task,
            memory=self.mem,
            time=self.time,
            partition=self.partition,
            cpu_partition=cpu_partition,
            account=self.account,
            more=self.more,
        )

    def check(self, config: Config, *, builds_data: bool = False) -> str:
        """Refuse a run that cannot work in its allocation. Returns a line about its memory.

        Raises the errors of `check_run` and `check_memory`.
        """
        allocation = self.allocation_of(config)
        check_run(config, allocation.num_ranks, builds_data=builds_data)
        return check_memory(
            config,
            allocation.nodes,
            allocation.ranks_per_node,
            uses_gpus=allocation.gpus_per_node != 0,
            device_name=self.device_name,
            partition=self.partition or sbatch_value(self.file_of(config), "partition"),
        )


_OPTIONS = (
    click.option(
        "--nodes",
        type=MANY.option,
        default=1,
        show_default=True,
        help="Number of nodes of the training job.",
    ),
    click.option(
        "--devices-per-node",
        type=MANY.option,
        help="Number of ranks per node, one per GPU (one per task with --cpu). Default: from the "
        "sbatch file.",
    ),
    click.option(
        "--gpus/--cpu",
        "uses_gpus",
        default=None,
        help="Request GPUs, or none. Default: by hardware.device, where auto requests GPUs.",
    ),
    click.option(
        "--device-name", help="Model of the GPUs, for the memory check: h100-80gb, a100-40gb, ..."
    ),
    click.option(
        "--cpus-per-task",
        type=MANY.option,
        help="Number of CPU cores per rank. Default: from the sbatch file.",
    ),
    click.option(
        "--mem",
        help="Memory per node, in sbatch's format (64G; 0: all memory). Default: from the sbatch "
        "file.",
    ),
    click.option(
        "--time",
        help="Time limit, in sbatch's format (24:00:00, 2-00:00:00). Default: from the sbatch "
        "file.",
    ),
    click.option("--partition", help="Slurm partition of the training job."),
    click.option("--account", help="Slurm account of the jobs."),
    click.option(
        "--sbatch-option",
        "more",
        multiple=True,
        help="Further sbatch option of the training job (--qos=high). May be repeated.",
    ),
    click.option(
        "--max-requeues",
        type=MANY_OR_ZERO.option,
        help="Maximum number of requeues after lost ranks or nodes. Default: 20.",
    ),
    click.option(
        "--files", type=click.Path(path_type=Path), help="Folder with your own sbatch files."
    ),
)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a training job, which the function of a command gets as `request`."""

    @wraps(command)
    def with_request(**given: Any) -> Any:
        request = JobRequest(**{field.name: given.pop(field.name) for field in fields(JobRequest)})
        return command(request=request, **given)

    function: Callable[..., Any] = with_request
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
