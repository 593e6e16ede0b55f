"""Plan of a run on a cluster: memory, time, network and disk, and whether it fits.

`smallest_change` finds the cheapest change of the config that makes a run fit. Formulas and sources
are in docs/planning.md. Loads no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil

from data_pipeline.errors import BatchError, NotEnoughMemoryError
from megaback.config import Config
from megaback.config_batch import split_batch
from megaback.planning.collectives import StepCalls
from megaback.planning.data_facts import RunFacts
from megaback.planning.flops import ModelSize, flops_per_token
from megaback.planning.memory import RankMemory, checkpoint_bytes, rank_memory
from megaback.planning.network import Traffic
from megaback.planning.run_settings import (
    Cluster,
    calls_of,
    peak_flops,
    row_shares,
    setting_of,
    time_of,
    traffic_of,
)
from megaback.planning.step_time import StepTime

DEFAULT_MFU = 0.4
"""Model FLOPs utilization of published runs on A100s and H100s: docs/scale.md."""
_MAX_CHANGES = 3
_MAX_NODE_DOUBLINGS = 6
_DAY_S = 86_400
NODES = "--nodes"
"""Option of the commands for which changes are advised."""


@dataclass(frozen=True)
class Duration:
    """Duration of a run."""

    step_s: float
    mfu: float
    days: float | None
    device_hours: float | None


@dataclass(frozen=True)
class RunPlan:
    """Estimates for a run on a cluster."""

    size: ModelSize
    flops_per_token: float
    micro_batch_rows: int
    accumulation_steps: int
    step_tokens: int
    steps: int | None
    stages: dict[int, RankMemory]
    """Memory at every ZeRO stage, all else equal."""
    stage: int
    """ZeRO stage of the config."""
    traffic: Traffic
    calls: StepCalls
    traffic_s: float
    parts: StepTime | None
    """Time of a step by part; None: on a CPU, or on a device of unknown rates."""
    duration: Duration | None
    """Duration; None: the device's peak FLOP/s is unknown."""
    checkpoint_bytes: float
    checkpoints_kept: int | None
    """Number of checkpoints while one is being written; None: the run's length is unknown."""

    @property
    def memory(self) -> RankMemory:
        return self.stages[self.stage]


def plan_run(
    config: Config,
    facts: RunFacts,
    cluster: Cluster,
    mfu: float | None = None,
    rank: int | None = None,
) -> RunPlan:
    """Plan a run. Raises BatchError if the batch is not divisible by the ranks.

    Memory, traffic and calls are those of a rank, by default of the one that has most. The duration
    is that of the time by part, or at an MFU if one is given or there are no parts.
    """
    micro_rows, accumulation = split_batch(config.batch, cluster.ranks)
    lora = config.finetune.adapters
    flops = flops_per_token(config.model, facts.vocab_size, facts.attended_tokens, lora)
    step_tokens = config.batch.global_batch_rows * config.batch.context_tokens
    steps = None if facts.total_tokens is None else ceil(facts.total_tokens / step_tokens)
    parts = time_of(config, facts, cluster, rank)
    peak = peak_flops(config, cluster.device)
    duration = None
    if peak is not None:
        ideal_s = step_tokens * flops / (cluster.ranks * peak)
        if mfu is None:
            mfu = DEFAULT_MFU if parts is None else ideal_s / parts.total_s
        step_s = ideal_s / mfu
        days = None if steps is None else steps * step_s / _DAY_S
        hours = None if days is None else days * 24 * cluster.ranks
        duration = Duration(step_s, mfu, days, hours)
    traffic = traffic_of(config, facts, cluster, rank)
    return RunPlan(
        size=ModelSize.of(config.model, facts.vocab_size, lora),
        flops_per_token=flops,
        micro_batch_rows=micro_rows,
        accumulation_steps=accumulation,
        step_tokens=step_tokens,
        steps=steps,
        stages={
            other: memory_of(config, facts, cluster, stage=other, rank=rank)
            for other in (0, 1, 2, 3)
            if other == config.zero.stage or config.zero.offload == "none"
        },
        stage=config.zero.stage,
        traffic=traffic,
        calls=calls_of(config, facts, cluster, rank),
        traffic_s=traffic.durations(
            cluster.device, cluster.nodes, cluster.devices_per_node
        ).total_s,
        parts=parts,
        duration=duration,
        checkpoint_bytes=checkpoint_bytes(
            config.model, facts.vocab_size, config.optimizer.name, lora
        ),
        checkpoints_kept=None if steps is None else _checkpoints_kept(config, steps),
    )


def memory_of(
    config: Config,
    facts: RunFacts,
    cluster: Cluster,
    stage: int | None = None,
    rank: int | None = None,
) -> RankMemory:
    """Memory of a rank, by default of the one that has most, at the config's stage or another.

    Raises BatchError.
    """
    if stage is not None:
        config = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": stage})})
    return rank_memory(setting_of(config, facts, cluster, rank))


def fits(config: Config, facts: RunFacts, cluster: Cluster) -> bool:
    """Whether a rank's memory suffices. Raises BatchError."""
    return memory_of(config, facts, cluster).parts.total <= cluster.device.memory_bytes


def smallest_change(
    config: Config, facts: RunFacts, cluster: Cluster, *, can_add_nodes: bool = True
) -> str | None:
    """Change that makes the run fit, as overrides to type; None if there is none.

    One override if one suffices, else two or three; among equally many, the cheapest, in the order
    of more sharding, smaller micro-batch, activation checkpointing, ranks that share a row if one
    is too long, offload, more nodes.
    """
    options = [
        option for option in _changes(config, facts, cluster) if can_add_nodes or option[1] != NODES
    ]
    kinds = range(len(options))
    for count in range(1, _MAX_CHANGES + 1):
        for chosen in combinations(kinds, count):
            for words, changed, on in _combined(config, cluster, [options[k] for k in chosen]):
                try:
                    if fits(changed, facts, on):
                        return words
                except BatchError:
                    continue
    return None


def require_room(config: Config, facts: RunFacts, cluster: Cluster, plan: RunPlan) -> None:
    """Raises NotEnoughMemoryError, with the change that fits, unless the run fits."""
    needed, there = plan.memory.parts.total, cluster.device.memory_bytes
    if needed <= there:
        return
    raise NotEnoughMemoryError(
        f"{config.run} needs {needed / 1e9:.1f} GB on each of {cluster.shown}, which has "
        f"{there / 1e9:.1f} GB (peak: {plan.memory.moment}); "
        f"{advice_to_fit(config, facts, cluster)}"
    )


def advice_to_fit(
    config: Config, facts: RunFacts, cluster: Cluster, *, can_add_nodes: bool = True
) -> str:
    """Advice for a run that does not fit, as the end of a sentence."""
    change = smallest_change(config, facts, cluster, can_add_nodes=can_add_nodes)
    if change is not None:
        return f"the smallest change that fits is {change}"
    last = ", offload or more nodes" if can_add_nodes else " or offload"
    return (
        f"no smaller micro-batch, higher stage, checkpointing, sharing of rows{last} makes it fit; "
        "use a smaller model, or devices with more memory"
    )


_Option = tuple[str, str, tuple[object, ...]]


def _changes(config: Config, facts: RunFacts, cluster: Cluster) -> Iterator[_Option]:
    """(section, key, values) of possible changes, cheapest first, values mildest first."""
    stage, kept = config.zero.stage, config.training.activation_checkpointing
    rows, _ = split_batch(config.batch, cluster.ranks)
    if config.zero.reduce_once and stage >= 2:
        yield "zero", "reduce_once", (False,)
    if config.zero.hierarchical:
        yield "zero", "hierarchical", (False,)
    if stage < 2:
        yield "zero", "stage", tuple(range(stage + 1, 3))
    if rows > 1:
        smaller = tuple(size for size in range(rows - 1, 0, -1) if rows % size == 0)
        yield "batch", "micro_batch_rows", smaller
    if kept == "none":
        yield "training", "activation_checkpointing", ("selective",)
    if stage < 3:
        yield "zero", "stage", (3,)
    if kept != "block":
        yield "training", "activation_checkpointing", ("block",)
    shares = tuple(
        parts
        for parts in row_shares(config, cluster.ranks, cluster.devices_per_node)
        if parts > config.batch.sequence_parallel
    )
    one_row = config.batch.model_copy(update={"micro_batch_rows": 1})
    if shares and not fits(config.model_copy(update={"batch": one_row}), facts, cluster):
        yield "batch", "sequence_parallel", shares
    if config.zero.offload == "none" and not cluster.device.is_cpu:
        yield "zero", "offload", ("optimizer",)
    doublings = range(1, _MAX_NODE_DOUBLINGS + 1)
    yield "", NODES, tuple(cluster.nodes << doubling for doubling in doublings)
    if config.zero.offload != "parameters" and not cluster.device.is_cpu:
        yield "zero", "offload", ("parameters",)


def _combined(
    config: Config, cluster: Cluster, options: list[_Option]
) -> Iterator[tuple[str, Config, Cluster]]:
    """All combinations of the options' values, the mildest first."""
    if len({(section, key) for section, key, _ in options}) < len(options):
        return
    (section, key, values), *others = options
    for value in values:
        changed, on = config, cluster
        if section:
            part = getattr(config, section).model_copy(update={key: value})
            changed = config.model_copy(update={section: part})
            words = f"{section}.{key}={str(value).lower()}"
        else:
            on = replace(cluster, nodes=int(str(value)))
            words = f"{key} {value}"
        if not is_allowed(changed):
            continue
        if not others:
            yield words, changed, on
        else:
            for more, last_config, last_cluster in _combined(changed, on, others):
                yield f"{words} {more}", last_config, last_cluster


def is_allowed(config: Config) -> bool:
    """Whether the stage supports the offload, as in ZeroSection, and compilation."""
    if config.zero.hierarchical and config.zero.offload != "none":
        return False
    minimum = {"none": 0, "optimizer": 1, "parameters": 3}[config.zero.offload]
    maximum = 2 if config.training.compile == "on" else 3
    return minimum <= config.zero.stage <= maximum


def _checkpoints_kept(config: Config, steps: int) -> int:
    """Maximum number of checkpoints: the last, one being written, the best, and those for good."""
    section = config.checkpoint
    saved = 1 if section.every_steps is None else ceil(steps / section.every_steps)
    kept = section.keep_last + 1 + (config.validation.patience is not None)
    if section.keep_every_steps is not None:
        kept += steps // section.keep_every_steps
    return min(kept, max(saved, 1))
