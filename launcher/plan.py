"""`megaback plan`: predicted memory, time, network and disk of a run; needs no GPU."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.command import Command, examples, with_options
from data_pipeline.common.number_ranges import (
    MANY,
    PLANNED_TOKENS,
    QUANTITY,
    SOME_SHARE,
    VOCABULARY,
)
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo, table_lines
from data_pipeline.errors import ConfigError
from launcher.plan_choice import choice_to_json, require_own_config, show_choice, write_choice
from megaback.config import Config
from megaback.config_file import load_config
from megaback.horizons import horizons_of
from megaback.planning.data_facts import RunFacts, run_facts
from megaback.planning.devices import CPU, DEVICES, Device, cpu_device, find_device
from megaback.planning.host_memory import host_memory_bytes
from megaback.planning.memory import Parts
from megaback.planning.network import ring_rate
from megaback.planning.plan import DEFAULT_MFU, RunPlan, plan_run, require_room, smallest_change
from megaback.planning.run_settings import Cluster
from megaback.planning.search import search
from megaback.planning.step_time import StepTime

nodes_option = click.option(
    "--nodes", type=MANY.option, default=1, show_default=True, help="Number of nodes."
)
devices_per_node_option = click.option(
    "--devices-per-node",
    type=MANY.option,
    help="Number of ranks per node, one per device. Default: hardware.processes, or 8.",
)
memory_option = click.option(
    "--memory-gb",
    type=QUANTITY.option,
    help="Memory per device, in GB (10**9 bytes). Default: that of --device-name.",
)
_GB = 1e9
_ROUNDED_UP = 0.05


def choose_device(
    name: str | None, config: Config, devices_per_node: int, memory_gb: float | None
) -> Device:
    """The device of an option or of the config; a CPU if `hardware.device` is `cpu`.

    Raises ConfigError.
    """
    name = name or config.hardware.device_name
    if name is None and config.hardware.device == "cpu":
        name = CPU
    if name is None:
        raise ConfigError(
            "the devices of the run are unknown; give --device-name, or set "
            f"hardware.device_name: {', '.join(DEVICES)}, or {CPU}"
        )
    memory_bytes = None if memory_gb is None else memory_gb * _GB
    if name.lower() == CPU:
        share = host_memory_bytes() / devices_per_node
        return cpu_device(memory_bytes or share, config.hardware.peak_flops)
    return find_device(name, memory_bytes)


def _rows(plan: RunPlan, cluster: Cluster) -> list[str]:
    """The table of stages, as lines."""
    names = [
        name
        for name in asdict(Parts())
        if any(asdict(memory.parts)[name] for memory in plan.stages.values())
    ]
    titles = ["ZeRO", *names, "total", "peak in"]
    rows = []
    for stage, memory in plan.stages.items():
        parts = asdict(memory.parts)
        is_full = memory.parts.total > cluster.device.memory_bytes
        mark = ">" if stage == plan.stage else " "
        cells = [_gigabytes(parts[name]) for name in names]
        total = _gigabytes(memory.parts.total)
        rows.append([f"{mark} {stage}", *cells, total, memory.moment + "; does not fit" * is_full])
    return table_lines(titles, rows, right=range(1, len(titles) - 1), indent=9)


def _gigabytes(number: float) -> str:
    gigabytes = number / _GB
    if not number:
        return "-"
    return f"{gigabytes:.1f}" if gigabytes >= _ROUNDED_UP else f"{gigabytes:.3f}"


def shown_parts(parts: StepTime) -> str:
    """The time of a step by part, as text."""
    hidden = ""
    if parts.hidden_network_s >= _ROUNDED_UP * parts.total_s:
        hidden = f" besides {parts.hidden_network_s:.3g} that computing hides"
    return (
        f"{parts.arithmetic_s:.3g} s of arithmetic, {parts.memory_s:.3g} bound by memory, "
        f"{parts.network_s:.3g} of network{hidden}, {parts.host_s:.3g} of host"
    )


def _shown_calls(plan: RunPlan, cluster: Cluster) -> str:
    """Number of collectives per step by place and kind, as text."""
    texts = []
    for place, numbers in plan.calls.by_place(plan.traffic, cluster.nodes).items():
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(numbers.items()))
        if kinds:
            where = "within the node" if place == "within_node" else "between nodes"
            texts.append(f"{sum(numbers.values()):,} {where} ({kinds})")
    return f"collectives per step: {'; '.join(texts)}"


def _show(
    config: Config, facts: RunFacts, cluster: Cluster, plan: RunPlan, *, has_mfu: bool
) -> None:
    batch, device = config.batch, cluster.device
    size = plan.size
    echo(
        f"model    {size.total:,} parameters ({size.matrices:,} in the blocks' matrices), "
        f"{plan.flops_per_token / 1e9:.3g} GFLOP per token"
    )
    echo(
        f"step     {plan.micro_batch_rows} rows x {batch.context_tokens:,} tokens x "
        f"{config.batch.shown_ranks(cluster.ranks)} x {plan.accumulation_steps} accumulation = "
        f"{plan.step_tokens:,} tokens"
    )
    if plan.steps is not None:
        ends = "" if facts.end_reason is None else f"; ends early: {facts.end_reason}"
        echo(f"run      {plan.steps:,} steps = {plan.steps * plan.step_tokens:,} tokens{ends}")
    for use in facts.data:
        echo(f"data     {use.shown()}")
    horizons = horizons_of(config)
    if horizons:
        decay_steps = sum(one.steps - one.branch_step for one in horizons)
        echo(f"         and {decay_steps:,} steps of decay, in branches that are not counted below")
    for horizon in horizons:
        echo(
            f"horizon  {horizon.name} tokens: decays from step {horizon.branch_step:,} to "
            f"{horizon.steps:,}, in {horizon.run(config.run)}"
        )
    echo(f"memory   GB per rank; {cluster.shown} has {device.memory_bytes / _GB:.1f}")
    for line in _rows(plan, cluster):
        click.echo(line)
    if plan.memory.host_bytes_per_node:
        echo(
            f"host     {_gigabytes(plan.memory.host_bytes_per_node)} GB of memory per node, for "
            "checkpoints that are being written and offloaded state; "
            f"{_gigabytes(plan.memory.host_bytes_at_start_per_node)} at the start, for whole models"
        )
    place = cluster.nodes, cluster.devices_per_node
    between = plan.traffic.between_nodes.total, plan.traffic.rate_between(device, *place)
    links = [("between nodes" if cluster.nodes > 1 else "within the node", *between)]
    if plan.traffic.node is not None:
        rate = ring_rate(device, 1, cluster.devices_per_node)
        links.append(("within the node", plan.traffic.node.total, rate))
    used = ", and ".join(
        f"{_gigabytes(num_bytes)} GB {link}, in rings at {rate / _GB:.0f} GB/s"
        for link, num_bytes, rate in links
    )
    exchange, divided = plan.traffic.sequence, ""
    if exchange.sent_bytes:
        where = "within the node" if exchange.is_within_node else "between nodes"
        divided = f", parts of rows {_gigabytes(exchange.sent_bytes)}"
        used += f", and {_gigabytes(exchange.sent_bytes)} GB of activations {where}"
    echo(
        f"network  {_gigabytes(plan.traffic.total)} GB per step from each rank (gradients "
        f"{_gigabytes(plan.traffic.gradient_bytes)}, weights "
        f"{_gigabytes(plan.traffic.weight_bytes)}, Muon {_gigabytes(plan.traffic.optimizer_bytes)}"
        f"{divided}): {used}; {plan.traffic_s:.2f} s"
    )
    if cluster.ranks > 1:
        echo(f"calls    {_shown_calls(plan, cluster)}")
    kept = plan.checkpoints_kept
    shards = "" if facts.shard_bytes is None else f"; shards {_gigabytes(facts.shard_bytes)} GB"
    checkpoints = "" if kept is None else f" x {kept} = {_gigabytes(kept * plan.checkpoint_bytes)}"
    echo(f"disk     checkpoints {_gigabytes(plan.checkpoint_bytes)}{checkpoints} GB{shards}")
    if plan.duration is None:
        echo("time     unknown: set hardware.peak_flops, the FLOP/s of a device")
    else:
        duration, days = plan.duration, ""
        if duration.days is not None and duration.device_hours is not None:
            days = f"; {duration.days:.3g} days = {duration.device_hours:,.0f} device-hours"
        echo(f"time     {duration.step_s:.3g} s per step, an MFU of {duration.mfu:.0%}{days}")
        if plan.parts is not None and not has_mfu:
            echo(f"         {shown_parts(plan.parts)}")
            echo("note     time is predicted by part from published speeds (docs/planning.md)")
    if plan.duration is not None and plan.traffic_s > plan.duration.step_s:
        echo("note     the network takes longer than the step: this MFU cannot be reached")
    if device.is_cpu:
        echo(
            "note     glibc keeps freed memory: allow 40% more, or export "
            "MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 (docs/planning.md)"
        )
    for note in facts.notes:
        echo(f"note     {with_options(note)}")


def to_json(
    config: Config,
    facts: RunFacts,
    cluster: Cluster,
    plan: RunPlan,
    change: str | None,
) -> dict[str, Any]:
    """The plan as JSON fields, in bytes, seconds and days."""
    stages = {
        stage: {**asdict(memory), "total_bytes": memory.parts.total}
        for stage, memory in plan.stages.items()
    }
    return {
        **asdict(plan),
        "parameters": plan.size.total,
        "collectives": plan.calls.by_place(plan.traffic, cluster.nodes),
        "stages": stages,
        "fits": plan.memory.parts.total <= cluster.device.memory_bytes,
        "smallest_change": change,
        "mfu": None if plan.duration is None else plan.duration.mfu,
        "horizons": [asdict(horizon) for horizon in horizons_of(config)],
        "cluster": asdict(cluster),
        "facts": asdict(facts),
    }


@click.command(
    cls=Command,
    name="plan",
    epilog=examples(
        "megaback plan configs/reverse_7b.yaml --nodes 8 --device-name h100-80gb",
        "megaback plan configs/reverse_7b.yaml --nodes 64 --device-name h100-80gb --choose",
        "megaback plan configs/demo.yaml model.width=512 --device-name cpu",
        "megaback plan configs/reverse_1b.yaml --device-name a100-80gb --training-tokens "
        "2e10 --vocab-size 32000 --json",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@nodes_option
@devices_per_node_option
@click.option(
    "--device-name",
    help=f"Device: {', '.join(DEVICES)} or {CPU}. Default: hardware.device_name.",
)
@memory_option
@click.option(
    "--network-gbits",
    type=QUANTITY.option,
    help="Network bandwidth per device, in Gbit/s. Default: by --device-name (docs/planning.md).",
)
@click.option(
    "--mfu",
    type=SOME_SHARE.option,
    help="Model FLOPs utilization, as a fraction of the device's peak. Default: predicted for "
    f"GPUs, {DEFAULT_MFU} for a CPU.",
)
@click.option(
    "--training-tokens",
    type=PLANNED_TOKENS.option,
    help="Length of the run, in tokens (1.1e11). Default: from the config and its data.",
)
@click.option(
    "--vocab-size",
    type=VOCABULARY.option,
    help="Vocabulary size, if there is no data yet. Default: 8888.",
)
@click.option(
    "--choose",
    "does_choose",
    is_flag=True,
    help="Find the fastest settings of zero, activation checkpointing and micro-batch that fit, "
    "and print five of them.",
)
@click.option(
    "--write", "does_write", is_flag=True, help="With --choose: put the fastest ones into CONFIG."
)
@json_option
def main(
    config: Path,
    overrides: tuple[str, ...],
    nodes: int,
    devices_per_node: int | None,
    device_name: str | None,
    memory_gb: float | None,
    network_gbits: float | None,
    mfu: float | None,
    training_tokens: float | None,
    vocab_size: int | None,
    does_choose: bool,
    does_write: bool,
    as_json: bool,
) -> None:
    """Estimate what the run of CONFIG, with key.sub=value OVERRIDES, needs on a cluster.

    No GPU is needed. If the run does not fit, the exit code is 14 and the smallest change that
    fits is printed.
    """
    if does_write:
        if not does_choose:
            raise ConfigError("`write` writes what `choose` has found; give both")
        require_own_config(config, overrides)
    if does_choose and mfu is not None:
        raise ConfigError("`choose` predicts the speed that `mfu` gives; omit one of the two")
    settings = load_config(config, overrides)
    per_node = devices_per_node or settings.hardware.processes or 8
    chosen = choose_device(device_name, settings, per_node, memory_gb)
    if network_gbits is not None:
        chosen = chosen.with_network(network_gbits * 1e9 / 8)
    if settings.training.precision == "bf16" and chosen.bf16_flops is None and not chosen.is_cpu:
        raise ConfigError(f"{chosen.name} does not compute in bf16; set training.precision=fp32")
    cluster = Cluster(nodes, per_node, chosen)
    facts = run_facts(settings, vocab_size, training_tokens)
    if does_choose:
        found = search(settings, facts, cluster)
        written = write_choice(config, found.fastest[0]) if does_write else None
        if as_json:
            fields = choice_to_json(settings, facts, cluster, found)
            click.echo(json.dumps({**fields, "written": written}, indent=2))
            return
        show_choice(settings, facts, cluster, found)
        if written is not None:
            echo(f"written  {written}")
        return
    plan = plan_run(settings, facts, cluster, mfu)
    fits = plan.memory.parts.total <= chosen.memory_bytes
    if as_json:
        change = None if fits else smallest_change(settings, facts, cluster)
        click.echo(json.dumps(to_json(settings, facts, cluster, plan, change), indent=2))
    else:
        _show(settings, facts, cluster, plan, has_mfu=mfu is not None)
    require_room(settings, facts, cluster, plan)


if __name__ == "__main__":
    main()
