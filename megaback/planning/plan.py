"""Plan of a run on a cluster: memory, time, network and disk, and whether it fits.

`smallest_change` finds the cheapest change of the config that makes a run fit. Formulas and sources
are in docs/planning.md. Loads no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil

from data_pipeline.errors import BatchError, NotEnoughMemoryError
from megaback.config import Config, split_batch
from megaback.planning.activation_memory import Attention
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import Device
from megaback.planning.flops import ModelSize, flops_per_token
from megaback.planning.memory import RankMemory, Setting, checkpoint_bytes, rank_memory
from megaback.planning.network import Traffic, step_traffic

DEFAULT_MFU = 0.4
"""Model FLOPs utilization of published runs on A100s and H100s: docs/scale.md."""
_MAX_FLASH_HEAD_DIM = 256
_MAX_CHANGES = 3
_MAX_NODE_DOUBLINGS = 6
_DAY_S = 86_400
_NODES = "--nodes"


@dataclass(frozen=True)
class Cluster:
    """Devices, one rank each."""

    nodes: int
    devices_per_node: int
    device: Device

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def shown(self) -> str:
        return f"{self.nodes} x {self.devices_per_node} {self.device.name}"


@dataclass(frozen=True)
class Duration:
    """Duration of a run at an MFU."""

    step_s: float
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
    traffic_s: float
    duration: Duration | None
    """Duration; None: the device's peak FLOP/s is unknown."""
    checkpoint_bytes: float
    checkpoints_kept: int | None
    """Number of checkpoints while one is being written; None: the run's length is unknown."""

    @property
    def memory(self) -> RankMemory:
        return self.stages[self.stage]


def plan_run(
    config: Config, facts: RunFacts, cluster: Cluster, mfu: float, rank: int | None = None
) -> RunPlan:
    """Plan a run. Raises BatchError if the batch is not divisible by the ranks.

    Memory and traffic are those of a rank, by default of the one that has most.
    """
    micro_rows, accumulation = split_batch(config.batch, cluster.ranks)
    stage, precision = config.zero.stage, config.training.precision
    flops = flops_per_token(config.model, facts.vocab_size, facts.attended_tokens)
    step_tokens = config.batch.global_batch_rows * config.batch.context_tokens
    steps = None if facts.total_tokens is None else ceil(facts.total_tokens / step_tokens)
    peak = config.hardware.peak_flops or cluster.device.peak_flops(precision)
    duration = None
    if peak is not None:
        step_s = step_tokens * flops / (cluster.ranks * peak * mfu)
        days = None if steps is None else steps * step_s / _DAY_S
        duration = Duration(step_s, days, None if days is None else days * 24 * cluster.ranks)
    traffic = step_traffic(
        config.model,
        facts.vocab_size,
        ranks=cluster.ranks,
        accumulation_steps=accumulation,
        stage=stage,
        precision=precision,
        optimizer=config.optimizer.name,
        rank=rank,
        has_fp32_accumulators=config.has_fp32_accumulators,
        reduces_once=config.reduces_once(accumulation),
        reduction=config.zero.reduction,
    )
    return RunPlan(
        size=ModelSize.of(config.model, facts.vocab_size),
        flops_per_token=flops,
        micro_batch_rows=micro_rows,
        accumulation_steps=accumulation,
        step_tokens=step_tokens,
        steps=steps,
        stages={
            other: memory_of(config, facts, cluster, stage=other, rank=rank)
            for other in (0, 1, 2, 3)
            if other == stage or config.zero.offload == "none"
        },
        stage=stage,
        traffic=traffic,
        traffic_s=traffic.seconds(cluster.device, cluster.nodes),
        duration=duration,
        checkpoint_bytes=checkpoint_bytes(config.model, facts.vocab_size, config.optimizer.name),
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
    micro_rows, accumulation = split_batch(config.batch, cluster.ranks)
    return rank_memory(
        Setting(
            shape=config.model,
            vocab_size=facts.vocab_size,
            micro_batch_tokens=micro_rows * config.batch.context_tokens,
            accumulates=accumulation > 1,
            ranks=cluster.ranks,
            ranks_per_node=cluster.devices_per_node,
            stage=config.zero.stage,
            precision=config.training.precision,
            checkpointing=config.training.activation_checkpointing,
            optimizer=config.optimizer.name,
            offload=config.zero.offload,
            loss_chunk_tokens=config.training.loss_chunk_tokens,
            attention=_attention(config, cluster.device),
            saves_while_training=config.checkpoint.every_steps is not None,
            is_cpu=cluster.device.is_cpu,
            rank=rank,
            has_fp32_accumulators=config.has_fp32_accumulators,
            reduces_once=config.reduces_once(accumulation),
            overlaps=config.zero.overlaps_communication,
        )
    )


def fits(config: Config, facts: RunFacts, cluster: Cluster) -> bool:
    """Whether a rank's memory suffices. Raises BatchError."""
    return memory_of(config, facts, cluster).parts.total <= cluster.device.memory_bytes


def smallest_change(
    config: Config, facts: RunFacts, cluster: Cluster, *, can_add_nodes: bool = True
) -> str | None:
    """Change that makes the run fit, as overrides to type; None if there is none.

    One override if one suffices, else two or three; among equally many, the cheapest, in the order
    of more sharding, smaller micro-batch, activation checkpointing, offload, more nodes.
    """
    options = [
        option for option in _changes(config, cluster) if can_add_nodes or option[1] != _NODES
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
        f"no smaller micro-batch, higher stage, checkpointing{last} makes it fit; use a smaller "
        "model, or devices with more memory"
    )


_Option = tuple[str, str, tuple[object, ...]]


def _changes(config: Config, cluster: Cluster) -> Iterator[_Option]:
    """(section, key, values) of possible changes, cheapest first, values mildest first."""
    stage, kept = config.zero.stage, config.training.activation_checkpointing
    rows, _ = split_batch(config.batch, cluster.ranks)
    if config.zero.reduce_once and stage >= 2:
        yield "zero", "reduce_once", (False,)
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
    if config.zero.offload == "none" and not cluster.device.is_cpu:
        yield "zero", "offload", ("optimizer",)
    doublings = range(1, _MAX_NODE_DOUBLINGS + 1)
    yield "", _NODES, tuple(cluster.nodes << doubling for doubling in doublings)
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
        if not _is_allowed(changed):
            continue
        if not others:
            yield words, changed, on
        else:
            for more, last_config, last_cluster in _combined(changed, on, others):
                yield f"{words} {more}", last_config, last_cluster


def _is_allowed(config: Config) -> bool:
    """Whether the stage supports the offload, as in ZeroSection, and compilation."""
    minimum = {"none": 0, "optimizer": 1, "parameters": 3}[config.zero.offload]
    maximum = 2 if config.training.compile == "on" else 3
    return minimum <= config.zero.stage <= maximum


def _attention(config: Config, device: Device) -> Attention:
    """Backend that hardware.attention selects on a device; all kernels need the same memory."""
    can_flash = (
        not device.is_cpu
        and config.training.precision == "bf16"
        and config.model.head_dim <= _MAX_FLASH_HEAD_DIM
    )
    return "flash_attn" if can_flash and config.hardware.attention != "sdpa" else "sdpa"


def _checkpoints_kept(config: Config, steps: int) -> int:
    """Maximum number of checkpoints: the last, one being written, the best, and those for good."""
    section = config.checkpoint
    saved = 1 if section.every_steps is None else ceil(steps / section.every_steps)
    kept = section.keep_last + 1 + (config.validation.patience is not None)
    if section.keep_every_steps is not None:
        kept += steps // section.keep_every_steps
    return min(kept, max(saved, 1))
