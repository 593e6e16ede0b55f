"""`megaback new`: writes the config of a run for a size, a time or a number of FLOPs."""

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.next_command import command, free_path, show_next
from data_pipeline.common.number_ranges import (
    MANY,
    PLANNED_TOKENS,
    QUANTITY,
    SOME_SHARE,
    TRAINING_FLOPS,
    VOCABULARY,
)
from data_pipeline.common.output_paths import (
    file_with_mark,
    overwrite_option,
    require_output,
    write_output,
)
from data_pipeline.common.short_numbers import ShortNumber, shown_short
from data_pipeline.common.terminal import echo
from data_pipeline.errors import ConfigError
from launcher.plan import memory_option, nodes_option
from launcher.ranks.local import rank_environment
from megaback import __version__
from megaback.distributed.visible_devices import count_devices
from megaback.planning.budget import Budget, sized_run
from megaback.planning.config_text import config_text, scalar
from megaback.planning.data_summary import DataSummary
from megaback.planning.devices import CPU, DEVICES, cpu_device, find_device
from megaback.planning.host_memory import host_memory_bytes
from megaback.planning.new_config import NewConfig, new_config
from megaback.planning.plan import DEFAULT_MFU, plan_run
from megaback.planning.run_settings import Cluster
from megaback.planning.scaling_rules import muon_flops

_MARK = "# Written by `megaback new"
_GPUS_PER_NODE = 8
START_S = 20.0
"""Time in which a run on a CPU starts, loads, and saves at its end."""
_FIRST_GUESS_FLOPS = 2e10


def _cluster(
    device_name: str | None, nodes: int, devices_per_node: int | None, memory_gb: float | None
) -> Cluster:
    """The devices of the options; by default, this machine's CPU."""
    if device_name is None and (count := count_devices()):
        raise ConfigError(
            f"this machine has {count} GPUs of a model that is not known; give `device_name`: "
            f"{', '.join(DEVICES)}, or {CPU}"
        )
    memory_bytes = None if memory_gb is None else memory_gb * 1e9
    if (device_name or CPU).lower() == CPU:
        per_node = devices_per_node or 1
        share = memory_bytes or host_memory_bytes() / per_node
        return Cluster(nodes, per_node, cpu_device(share, None))
    device = find_device(str(device_name), memory_bytes)
    return Cluster(nodes, devices_per_node or _GPUS_PER_NODE, device)


def _require_one_budget(
    parameters: float | None, minutes: float | None, flops: float | None
) -> None:
    if minutes is not None and flops is not None:
        raise ConfigError("`minutes` and `flops` both limit the length of training; give one")
    if parameters is None and minutes is None and flops is None:
        raise ConfigError("give `parameters`, `minutes` or `flops`")


def _gpu_flops(cluster: Cluster, mfu: float) -> float | None:
    """FLOP/s of all devices at an MFU; None for a CPU."""
    device = cluster.device
    peak = device.peak_flops("fp32" if device.bf16_flops is None else "bf16")
    return None if peak is None else cluster.ranks * peak * mfu


def _measured(budget: Budget, data: DataSummary, cluster: Cluster) -> Budget:
    """The budget with the rate of a CPU, measured on the model that it suffices for.

    A model is chosen by a guess, measured, chosen again by its rate, and measured once more. Raises
    NotEnoughMemoryError before a model is made that does not fit.
    """
    from megaback.profiling.cpu_rate import measured_flops

    threads = int(rank_environment(cluster.devices_per_node)["OMP_NUM_THREADS"])
    click.echo("measuring this machine's rate of training steps", err=True)
    flops = _FIRST_GUESS_FLOPS * cluster.ranks
    for _ in range(2):
        with suppress(ConfigError):  # the guess may be too small, but not the memory
            new_config(budget.at_rate(flops), data, cluster, "runs/new")
        run = sized_run(budget.at_rate(flops), data)
        rows = max(round(run.batch_tokens / run.context_tokens / cluster.ranks), 1)
        flops = cluster.ranks * measured_flops(
            run.shape, data.vocab_size, run.context_tokens, rows, threads
        )
    return budget.at_rate(float(f"{flops:.3g}"))


def _head(words: list[str], made: NewConfig, cluster: Cluster, estimate: list[str]) -> list[str]:
    shown = shlex.join(["megaback", "new", *words])
    return [
        f"{_MARK.removeprefix('# ')}` of megaback {__version__}: {shown}",
        f"For {cluster.shown}. `megaback config --explain KEY` explains a key.",
        *estimate,
        *made.notes,
    ]


def _estimate(made: NewConfig, cluster: Cluster, budget: Budget, mfu: float) -> list[str]:
    plan = plan_run(made.config, made.facts, cluster, mfu)
    tokens = float(made.facts.total_tokens or 0)
    flops = tokens * plan.flops_per_token
    lines = [
        f"{plan.size.total:,} parameters, {tokens:,.0f} tokens, {flops:.3g} FLOPs, "
        f"{plan.memory.parts.total / 1e9:.1f} of {cluster.device.memory_bytes / 1e9:.1f} GB"
    ]
    if made.config.zero.offload != "none":
        lines.append(
            f"{plan.memory.host_bytes_per_node / 1e9:,.1f} GB of host memory per node, for "
            "offloaded state and checkpoints that are being written"
        )
    assumed = _gpu_flops(cluster, mfu)
    rate = budget.sustained_flops or assumed
    if rate is not None:
        config = made.config
        if config.optimizer.name == "muon" and config.training.steps is not None:
            flops += config.training.steps * muon_flops(config.model)
        minutes = flops / rate / 60
        shown = f"{minutes:,.1f} minutes" if minutes < 120 else f"{minutes / 60:,.1f} hours"
        source = f", which assumes an MFU of {mfu:.0%}" if rate == assumed else ""
        lines.append(f"{shown} of training steps at {rate:.3g} FLOP/s{source}")
    return lines


@click.command(
    cls=WorkCommand,
    name="new",
    epilog=examples(
        "megaback new --minutes 10 --shards demo/shards --out my.yaml",
        "megaback new --parameters 124M --device-name h100-80gb --devices-per-node 1 "
        "--out run.yaml",
        "megaback new --flops 1e21 --nodes 8 --device-name h100-80gb --vocab-size 32000 "
        "--out run.yaml",
    ),
)
@click.option(
    "--parameters",
    type=ShortNumber(PLANNED_TOKENS),
    help="Size of the model, embeddings included: 124M, 1.1B.",
)
@click.option(
    "--minutes",
    type=QUANTITY.option,
    help="Duration of the run: the best model for it, or the tokens for --parameters.",
)
@click.option(
    "--flops",
    type=TRAINING_FLOPS.option,
    help="FLOPs of training: the best model for them, or the tokens for --parameters.",
)
@click.option(
    "--shards",
    type=click.Path(),
    help="Folder or URL of a data set: its vocabulary, tokens and document lengths are used. "
    "Default: a placeholder.",
)
@click.option(
    "--vocab-size",
    type=VOCABULARY.option,
    help="Vocabulary size, if there are no --shards yet. Default: 8888.",
)
@click.option(
    "--device-name",
    help=f"Device: {', '.join(DEVICES)} or {CPU}. Default: this machine's CPU.",
)
@nodes_option
@click.option(
    "--devices-per-node",
    type=MANY.option,
    help="Number of ranks per node, one per device. Default: 8 GPUs, or one rank on a CPU.",
)
@memory_option
@click.option(
    "--mfu",
    type=SOME_SHARE.option,
    default=DEFAULT_MFU,
    show_default=True,
    help="Model FLOPs utilization of a GPU that --minutes assumes.",
)
@click.option(
    "--device-flops",
    type=QUANTITY.option,
    help="FLOP/s of a device while training, for --minutes. Default: measured on a CPU, --mfu of "
    "the peak of a GPU.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="YAML file to write.")
@overwrite_option
def main(
    parameters: float | None,
    minutes: float | None,
    flops: float | None,
    shards: str | None,
    vocab_size: int | None,
    device_name: str | None,
    nodes: int,
    devices_per_node: int | None,
    memory_gb: float | None,
    mfu: float,
    device_flops: float | None,
    out: Path,
    overwrite: bool,
) -> None:
    """Write the config of a run for a size, a time, or a number of FLOPs.

    Shape, tokens, batch and learning rate follow published scaling rules (docs/planning.md), and
    the rest what fits the devices. Each value is printed with its reason, which is also in the
    file. The same options give the same file, except for a rate that is measured.
    """
    _require_one_budget(parameters, minutes, flops)
    require_output(out, (), is_ours=file_with_mark(_MARK.encode()), overwrite=overwrite)
    if shards is not None and vocab_size is not None:
        raise ConfigError("`vocab_size` is that of the `shards`; omit it")
    cluster = _cluster(device_name, nodes, devices_per_node, memory_gb)
    data = DataSummary.assumed(vocab_size) if shards is None else DataSummary.of(shards)
    budget = Budget(parameters=parameters, flops=flops)
    if minutes is not None:
        budget = _timed(budget, minutes, device_flops, mfu, data, cluster)
    made = new_config(budget, data, cluster, str(free_path(Path("runs") / out.stem)))
    estimate = _estimate(made, cluster, budget, mfu)
    words = _words()
    write_output(
        out, config_text(made.choices, _head(words, made, cluster, estimate)), overwrite=overwrite
    )
    _show(made, estimate, out, cluster)


def _timed(
    budget: Budget,
    minutes: float,
    device_flops: float | None,
    mfu: float,
    data: DataSummary,
    cluster: Cluster,
) -> Budget:
    seconds = 60 * minutes - (START_S if cluster.device.is_cpu else 0.0)
    if seconds <= 0:
        raise ConfigError(
            f"`minutes` is {minutes:g}, and a run takes {START_S:.0f} s to start and to save; "
            "give more"
        )
    budget = replace(budget, seconds=seconds)
    if device_flops is not None:
        return budget.at_rate(cluster.ranks * device_flops)
    if cluster.device.is_cpu:
        return _measured(budget, data, cluster)
    rate = _gpu_flops(cluster, mfu)
    assert rate is not None  # of every GPU with a name
    return budget.at_rate(rate)


def _words() -> list[str]:
    """The options of this command that were given, without the addresses of shards."""
    context = click.get_current_context()
    words = []
    for parameter in context.command.params:
        name = str(parameter.name)
        is_given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and name not in ("out", "overwrite", "shards", "verbose"):
            value = context.params[name]
            is_short = isinstance(parameter.type, ShortNumber)
            words += [parameter.opts[0], shown_short(value) if is_short else f"{value}"]
    return words


def _show(made: NewConfig, estimate: list[str], out: Path, cluster: Cluster) -> None:
    width = max(len(choice.key) for choice in made.choices)
    for choice in made.choices:
        echo(f"{choice.key:<{width}}  {scalar(choice.value):<12}  {choice.reason}".rstrip())
    for line in estimate:
        echo(f"estimate  {line}")
    for note in made.notes:
        echo(f"note  {note}")
    plan = command(
        "plan",
        out,
        *(["--nodes", cluster.nodes] if cluster.nodes > 1 else []),
        *(["--vocab-size", made.facts.vocab_size] if made.data.data_set is None else []),
    )
    next_commands = {plan: "memory, time, network and disk"}
    if cluster.nodes > 1:
        next_commands[command("submit", out, "--nodes", cluster.nodes)] = "train on Slurm"
    else:
        next_commands[command("train", out)] = "train"
    show_next(next_commands)


if __name__ == "__main__":
    main()
