"""The jobs of a pipeline, data -> train -> convert: their checks before submission, and their calls
of sbatch.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.build.plan import PLAN_NAME, Plan, make_plan
from data_pipeline.build.plan_command import claim_plan
from data_pipeline.build.settings import BuildSettings
from data_pipeline.common.output_folder import require_output_folder
from data_pipeline.errors import (
    CheckpointMissingError,
    ConfigError,
    OutputExistsError,
    StorageError,
)
from data_pipeline.loading.rows import check_context
from data_pipeline.redaction import is_url
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import MANIFEST_NAME
from data_pipeline.sources.weighted import weighted_sources
from data_pipeline.text.codec import Direction, TextCodec, Unit
from launcher.slurm.commands import Submission
from launcher.slurm.job import LIMIT_VARIABLE
from launcher.slurm.sbatch_files import sbatch_value
from megaback.branches import find_branch_point
from megaback.config import Config
from megaback.config_batch import split_batch
from megaback.copy_location import require_base_copy
from megaback.data import open_data
from megaback.faults.rolled_back_branches import require_no_rolled_back_branch
from megaback.horizons import require_branch_points
from megaback.run_folder import BRANCHES_FOLDER, LOGS_FOLDER, holds_weights

STAGES = ("data", "train", "convert")
ENVIRONMENT_VARIABLE = "MEGABACK_ENV"
_ARRAY = re.compile(r"0-(\d+)(%\d+)?")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Other requested resources; None keeps the value of the sbatch file."""

    cpus_per_task: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    cpu_partition: str | None = None
    account: str | None = None
    more: tuple[str, ...] = ()
    """Further options of sbatch, unchanged."""


@dataclass(frozen=True)
class Allocation:
    """Nodes of the training job, and ranks per node, one per device."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int | None
    """Number of GPUs per node; None keeps the value of the sbatch file."""

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def parse_chain(text: str) -> tuple[str, ...]:
    """`data,train,convert` or a part of it. Raises ConfigError."""
    names = tuple(name.strip() for name in text.split(","))
    wanted = tuple(name for name in STAGES if name in names)
    if names != wanted or "train" not in names:
        raise ConfigError(
            f"--chain {text!r} is not supported; give train, data,train or train,convert, or all "
            "of data,train,convert"
        )
    return names


def train_file(config: Config) -> str:
    """The sbatch file for a config."""
    return "train.sbatch" if config.init_from is None else "finetune.sbatch"


def choose_allocation(
    config: Config,
    file: Path,
    nodes: int,
    devices_per_node: int | None,
    uses_gpus: bool | None,
) -> Allocation:
    """One rank per device. Raises ConfigError for a config of another kind of device."""
    device = config.hardware.device
    if uses_gpus is None:
        uses_gpus = device != "cpu"
    if uses_gpus is (device == "cpu") and device != "auto":
        flag, other = ("--gpus", "--cpu") if uses_gpus else ("--cpu", "--gpus")
        raise ConfigError(
            f"hardware.device is {device}, but {flag} was given; give {other}, or another "
            "hardware.device"
        )
    if not uses_gpus:
        ranks = devices_per_node or config.hardware.processes or 1
        return Allocation(nodes, ranks, gpus_per_node=0)
    ranks = devices_per_node or int(sbatch_value(file, "ntasks-per-node") or 1)
    return Allocation(nodes, ranks, gpus_per_node=devices_per_node)


def check_run(config: Config, num_ranks: int, builds_data: bool) -> None:
    """Refuse a config that cannot train on `num_ranks`. Raises MegabackErrors."""
    split_batch(config.batch, num_ranks)
    require_branch_points(config)
    require_no_rolled_back_branch(config)
    if builds_data:
        find_branch_point(config)
    else:
        open_data(config, 0, num_ranks)
    base = config.init_from
    if isinstance(base, str):
        require_base_copy(base)
    elif base is not None and not holds_weights(base):
        raise CheckpointMissingError(
            f"init_from {base} is not a model's folder, a run with a checkpoint, or a checkpoint; "
            "name one of these"
        )
    for folder in (config.run.absolute(), *config.run.absolute().parents):
        if folder.exists():
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise StorageError(
                    f"the run {config.run} cannot be written: {folder} is not a folder, or not "
                    "writable; choose another run folder"
                )
            return


def check_model_folder(out: Path | None) -> Path:
    """The folder for the model. Raises ConfigError, OutputExistsError."""
    if out is None:
        raise ConfigError("the stage convert needs --out DIR, the folder for the model")
    require_output_folder(out)
    return out


def plan_data(
    config: Config,
    sources: Sequence[str],
    weights: Sequence[float],
    tokenizer: Path | None,
    num_tasks: int | None,
    cpus_per_task: int,
    dry_run: bool,
) -> Plan:
    """List the sources and freeze the plan of the build, unless there is one.

    Raises the errors of the sources, ConfigError, OutputExistsError.
    """
    shards = config.data.shards
    if len(shards) != 1 or is_url(shards[0].path):
        raise ConfigError(
            f"the stage data builds one data set in a folder, but data.shards is "
            f"{config.data.description}; build it before, and omit data from --chain"
        )
    out = Path(shards[0].path)
    if (out / MANIFEST_NAME).exists():
        raise OutputExistsError(
            f"{out} is already a finished data set ({DataSet.open(str(out)).name}); omit data from "
            "--chain, or choose another data.shards"
        )
    if not sources and (out / PLAN_NAME).exists():
        plan = Plan.load(out)
    elif not sources or tokenizer is None:
        raise ConfigError(
            f"the stage data needs --source and --tokenizer, or a plan in {out} that "
            "`megaback shards plan` wrote"
        )
    else:
        codec = TextCodec.load(tokenizer, Direction.BACKWARD, Unit.TOKEN)
        settings = BuildSettings(
            weighted_sources(tuple(sources), tuple(weights)), codec.format.tokenizer_sha256
        )
        check_context(config.batch.context_tokens, settings.frame_tokens)
        if num_tasks is None and cpus_per_task > 1 and not (out / PLAN_NAME).exists():
            by_size = make_plan(settings).num_tasks
            num_tasks = -(-by_size // cpus_per_task) * cpus_per_task
        if dry_run and not (out / PLAN_NAME).exists():
            plan = make_plan(settings, num_tasks)
        else:
            plan, _ = claim_plan(settings, codec, out, num_tasks)
    check_context(config.batch.context_tokens, plan.settings.frame_tokens)
    return plan


def data_stage(config: Config, file: Path, plan: Plan, resources: Resources) -> Submission:
    """The job array for the tasks of a plan."""
    cpus = int(sbatch_value(file, "cpus-per-task") or 1)
    options = []
    if plan.num_tasks % cpus:
        cpus = 1
        options.append("--cpus-per-task=1")
    shipped = _ARRAY.fullmatch(sbatch_value(file, "array") or "")
    at_a_time = shipped[2] or "" if shipped else ""
    options.append(f"--array=0-{plan.num_tasks // cpus - 1}{at_a_time}")
    return Submission(
        stage="data",
        variables=_environment(),
        options=(*_common(config, "data", "%A_%a", resources, resources.cpu_partition), *options),
        file=str(file),
        arguments=("--out", str(Path(config.data.shards[0].path).absolute())),
    )


def train_stage(
    config: Config,
    file: Path,
    config_path: Path,
    allocation: Allocation,
    resources: Resources,
    limit: int | None,
    array: str | None = None,
) -> Submission:
    """The job that trains a run; with `array`, one run per element, of the config at its index.

    `%a` in `config_path` is the index of the element.
    """
    asked = {
        "nodes": allocation.nodes,
        "ntasks-per-node": allocation.ranks_per_node,
        "gpus-per-node": allocation.gpus_per_node,
        "cpus-per-task": resources.cpus_per_task,
        "mem": resources.memory,
        "time": resources.time,
        "array": array,
    }
    variables = _environment()
    if limit is not None:
        variables[LIMIT_VARIABLE] = str(limit)
    return Submission(
        stage="train",
        variables=variables,
        options=(
            *_common(config, "train", "%A_%a" if array else "%j", resources, resources.partition),
            *(f"--{name}={value}" for name, value in asked.items() if value is not None),
            *resources.more,
        ),
        file=str(file),
        arguments=(str(config_path),),
    )


def convert_stage(config: Config, file: Path, out: Path, resources: Resources) -> Submission:
    """The job that converts a run's newest checkpoint to a model."""
    return Submission(
        stage="convert",
        variables=_environment(),
        options=tuple(_common(config, "convert", "%j", resources, resources.cpu_partition)),
        file=str(file),
        arguments=(str(config.run.absolute()), "--out", str(out.absolute())),
    )


def _common(
    config: Config, stage: str, number: str, resources: Resources, partition: str | None
) -> list[str]:
    folder = str(config.run.absolute() / LOGS_FOLDER).replace("%", "%%")
    name, above = config.run.name, config.run.parent
    if above.name == BRANCHES_FOLDER:
        name = f"{above.parent.name}-{name}"
    options = [f"--job-name={name}-{stage}", f"--output={folder}/{stage}-{number}.out"]
    if partition is not None:
        options.append(f"--partition={partition}")
    if resources.account is not None:
        options.append(f"--account={resources.account}")
    return options


def _environment() -> dict[str, str]:
    """Variables of a job: this command's own environment, unless another one is set."""
    return {ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE, sys.prefix)}
