"""`megaback rehearse`: single ranks of a large run on this machine, without communication."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import COUNT, MANY
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo, table_lines
from data_pipeline.errors import ConfigError, MegabackError
from launcher.plan import choose_device, devices_per_node_option, nodes_option
from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import DEVICES, cpu_device
from megaback.planning.plan import DEFAULT_MFU, RunPlan, plan_run, require_room
from megaback.planning.run_settings import Cluster
from megaback.rehearsal.job import Device, Job, parse_ranks, rehearsal_config, rehearse
from megaback.rehearsal.report import Ownership, RankFailure, RankReport, RowsCheck
from megaback.rehearsal.rows import check_rows

_NOT_REHEARSED = (
    "values of losses and weights (other ranks send nothing), the network, GPUs, compilation, "
    "validation, preflight and trackers"
)


def planned_bytes(plan: RunPlan) -> dict[tuple[str, str], float]:
    """Planned bytes per step that a rank sends, by group and kind of collective."""
    parts = [("engine", plan.traffic.between_nodes)]
    if plan.traffic.node is not None:
        parts.append(("node", plan.traffic.node))
    planned = {
        (group, kind): num_bytes
        for group, part in parts
        for kind, num_bytes in (
            (part.reduction, part.gradient_bytes),
            ("all-gather", part.weight_bytes),
            ("all-to-all", part.optimizer_bytes),
        )
    }
    exchange = plan.traffic.sequence
    key = "engine" if exchange.is_of_all_ranks else "node", "all-to-all"
    planned[key] = planned.get(key, 0.0) + exchange.sent_bytes
    return {key: num_bytes for key, num_bytes in planned.items() if num_bytes}


def _require_room(config: Config, device_name: str | None, nodes: int, per_node: int) -> None:
    """Raises the error of a run that does not fit its devices, if they are known."""
    if device_name is None and config.hardware.device_name is None:
        return
    facts = run_facts(config, None, None)
    device = choose_device(device_name, config, per_node, None)
    cluster = Cluster(nodes, per_node, device)
    require_room(config, facts, cluster, plan_run(config, facts, cluster, DEFAULT_MFU))


def _size(num_bytes: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def shown_checks(owned: Ownership, rows: RowsCheck, config: Config) -> Iterator[str]:
    """The checks over all ranks, as lines."""
    parts, zero = config.batch.sequence_parallel, config.zero
    readers = "one rank" if parts == 1 else f"{parts} ranks, each of which trains on a part of it"
    of_node = " of each node" if zero.hierarchical and zero.stage in (1, 2) else ""
    for problem in (*rows.problems, *owned.problems):
        yield f"problem  {problem}"
    if not rows.problems:
        of_steps = f"{rows.rows_per_step:,} of each of {rows.steps} steps"
        yield f"rows     {of_steps}, each read by {readers}"
    if owned.min_weights < owned.parameters and not owned.problems:
        yield (
            f"weights  {owned.parameters:,}, each updated by one rank{of_node}: "
            f"{owned.min_weights:,} to {owned.max_weights:,} per rank"
        )
    if owned.matrices:
        yield (
            f"Muon     {owned.matrices:,} matrices; {owned.ranks_without_matrices:,} "
            f"ranks{of_node} orthogonalize none"
        )


def planned_memory(plan: RunPlan) -> dict[str, float]:
    """Planned peak memory of a rank in bytes: at the start, of its steps, and with a checkpoint.

    A GPU's reserve is not included, which is outside its allocator; the start is on its host.
    """
    allocated = dict(plan.memory.allocated)
    start, saving = allocated.pop("start", 0.0), allocated.pop("saving", 0.0)
    training = max(allocated.values())
    return {"start": start, "training": training, "saving": max(training, saving)}


def _show_rank(report: RankReport, plan: RunPlan, world_size: int) -> None:
    batch, owned = report.first_batch, report.owned
    echo(f"rank {report.rank} of {world_size}")
    echo(
        f"  data        rows per step {batch.rows:,}, lanes {batch.lanes:,}; "
        f"{_size(batch.read_bytes)} read in {batch.duration_s:.2f} s to the first batch"
    )
    echo(
        f"  owns        {owned.weights:,} weights, {owned.gradients:,} gradients, "
        f"{_size(owned.optimizer_bytes)} of optimizer state, {owned.matrices:,} matrices"
    )
    echo(
        "  memory      "
        f"{_size(report.memory_start_bytes)} at the start, {_size(report.memory_training_bytes)} "
        f"while training, {_size(report.memory_saving_bytes)} with the checkpoint; planned "
        + ", ".join(_size(num_bytes) for num_bytes in planned_memory(plan).values())
    )
    phases = ", ".join(f"{name} {duration:.2f}" for name, duration in report.phase_s.items())
    device = "this machine" if report.device == "cpu" else "its GPU"
    echo(f"  step        {report.step_s:.2f} s on {device} ({phases}); CPU {report.step_cpu_s:.2f}")
    num_bytes = sum(report.checkpoint.values())
    echo(
        f"  checkpoint  {_size(num_bytes)} in {len(report.checkpoint)} files; planned "
        f"{_size(plan.checkpoint_bytes / world_size)}"
    )
    planned, planned_calls = planned_bytes(plan), plan.calls.by_group(plan.traffic)
    lines = []
    for one in report.traffic:
        key = one.group, one.kind
        lines.append(
            [
                *key,
                f"{one.calls:,}",
                f"{planned_calls[key]:,}" if key in planned_calls else "-",
                _size(one.sent_bytes),
                _size(planned[key]) if key in planned else "-",
            ]
        )
    heads = ["group", "collective", "per step", "planned", "sent", "planned"]
    for line in table_lines(heads, lines, right=range(2, len(heads)), indent=2):
        click.echo(line)


@click.command(
    cls=Command,
    name="rehearse",
    epilog=examples(
        "megaback rehearse configs/demo.yaml --nodes 2 --devices-per-node 2 zero.stage=1",
        "megaback rehearse configs/reverse_7b.yaml --nodes 64 --devices-per-node 8 --layers 2 "
        "--ranks 0,17,511 data.shards=data/pydocs --json",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@nodes_option
@devices_per_node_option
@click.option(
    "--ranks",
    help="Ranks to rehearse, one after another: numbers separated by commas, or all. Default: the "
    "first and the last.",
)
@click.option(
    "--steps",
    type=COUNT.option,
    default=2,
    show_default=True,
    help="Number of steps to train; the last one is measured.",
)
@click.option(
    "--layers",
    type=MANY.option,
    help="Number of layers of the rehearsed and planned model. Default: all of the config.",
)
@click.option(
    "--skip-arithmetic",
    is_flag=True,
    help="Do not compute matrix products, attention and initial weights: they are zeros. Memory, "
    "collectives and checks are the same, and the duration of a step is that of all other work.",
)
@click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    default="cpu",
    show_default=True,
    help="Device of the rank. On a GPU, its allocations are measured, and a step's duration is "
    "that of a run without communication.",
)
@click.option(
    "--device-name",
    help=f"Device whose memory is checked: {', '.join(DEVICES)}. Default: hardware.device_name.",
)
@json_option
def main(
    config: Path,
    overrides: tuple[str, ...],
    nodes: int,
    devices_per_node: int | None,
    ranks: str | None,
    steps: int,
    layers: int | None,
    skip_arithmetic: bool,
    device: Device,
    device_name: str | None,
    as_json: bool,
) -> None:
    """Rehearse single ranks of the run of CONFIG, with key.sub=value OVERRIDES.

    A rank trains in a process on this machine as if the others were there: data, engine, optimizer
    and checkpoint are real, and collectives are counted instead of sent. Its measurements are shown
    beside the plan. It fails with the error that the run would have at this size.
    """
    if skip_arithmetic and device != "cpu":
        raise ConfigError("`skip_arithmetic` is for a CPU; omit it, or use `device=cpu`")
    settings = load_config(config, overrides)
    per_node = devices_per_node or settings.hardware.processes or 8
    world_size = nodes * per_node
    chosen = parse_ranks(ranks, world_size)
    _require_room(settings, device_name, nodes, per_node)
    short = rehearsal_config(settings, steps, layers, device)
    rows = check_rows(short, world_size, steps)
    facts = run_facts(short, None, None)

    def plan_of(report: RankReport) -> RunPlan:
        planned = replace(cpu_device(1.0, None), name=report.device)
        return plan_run(short, facts, Cluster(nodes, per_node, planned), DEFAULT_MFU, report.rank)

    plans: list[tuple[RankReport, RunPlan]] = []
    failures: list[RankFailure] = []
    for report in rehearse(Job(short, chosen, world_size, per_node, skip_arithmetic)):
        if isinstance(report, RankFailure):
            failures.append(report)
            if not as_json:
                echo(f"rank {report.rank} of {world_size} failed: {report.error}")
            continue
        plan = plan_of(report)
        plans.append((report, plan))
        if as_json:
            continue
        if len(plans) == 1:
            echo(
                f"model    {plan.size.total:,} parameters in {short.model.num_layers} layers; "
                f"{short.optimizer.name}, {short.training.precision}, ZeRO stage {plan.stage}"
            )
            for line in shown_checks(report.ownership, rows, short):
                echo(line)
        _show_rank(report, plan, world_size)
    if as_json:
        click.echo(json.dumps(_to_json(plans, failures, rows, world_size), indent=2))
    else:
        echo(f"not rehearsed: {_NOT_REHEARSED}")
    if failures:
        raise failures[0].error
    problems = [*rows.problems, *problems_between([report for report, _ in plans])]
    if problems:
        raise MegabackError(f"{problems[0]}; please report this with the config")


def problems_between(reports: Sequence[RankReport]) -> list[str]:
    """Problems of the partitioning of weights, which every rank computes for all ranks."""
    found = [text for one in reports for text in one.ownership.problems]
    return found + [
        f"ranks {reports[0].rank} and {one.rank} partition the weights differently"
        for one in reports
        if one.ownership != reports[0].ownership
    ]


def _by_group(name: str, planned: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Planned numbers of the collectives of an engine and of a node, by kind."""
    return {
        field: {kind: number for (group, kind), number in planned.items() if group == of_group}
        for field, of_group in ((name, "engine"), (f"{name}_within_node", "node"))
    }


def _to_json(
    plans: Sequence[tuple[RankReport, RunPlan]],
    failures: Sequence[RankFailure],
    rows: RowsCheck,
    world_size: int,
) -> dict[str, object]:
    return {
        "world_size": world_size,
        "rows": asdict(rows),
        "ranks": [
            {
                **asdict(report),
                "planned": {
                    "memory_bytes": planned_memory(plan),
                    **_by_group("sent_bytes", planned_bytes(plan)),
                    **_by_group("calls", plan.calls.by_group(plan.traffic)),
                    "checkpoint_bytes": plan.checkpoint_bytes / world_size,
                },
            }
            for report, plan in plans
        ],
        "failures": [
            {
                "rank": one.rank,
                "error": type(one.error).__name__,
                "message": str(one.error),
                "exit_code": one.error.exit_code,
            }
            for one in failures
        ],
        "not_rehearsed": _NOT_REHEARSED,
    }


if __name__ == "__main__":
    main()
