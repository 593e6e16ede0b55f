"""Settings of memory, network and time that follow from a config and a cluster. Loads no torch."""

from dataclasses import dataclass, replace

from data_pipeline.errors import BatchError
from megaback.config import Config
from megaback.config_batch import split_batch, unequal_heads
from megaback.planning.activation_memory import Attention
from megaback.planning.collectives import StepCalls, step_calls
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import Device
from megaback.planning.memory import Setting
from megaback.planning.network import Traffic, step_traffic
from megaback.planning.sequence_exchange import sequence_exchange
from megaback.planning.step_time import StepTime, TimedStep, step_time

_MAX_FLASH_HEAD_DIM = 256
_MIN_PART_TOKENS = 4_096
"""Length of the parts of rows below which more ranks do not share them, in tokens."""


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


def batch_of(config: Config, cluster: Cluster) -> tuple[int, int]:
    """Rows per micro-batch, and accumulation steps, of each rank. Raises BatchError."""
    return split_batch(config.batch, cluster.ranks)


def row_shares(config: Config, ranks: int, ranks_per_node: int) -> list[int]:
    """Numbers of ranks of a node, or the config's, that can share rows, in ascending order."""
    given, shape = config.batch.sequence_parallel, config.model
    found = []
    for parts in sorted({given, *range(1, ranks_per_node + 1)}):
        batch = config.batch.model_copy(update={"sequence_parallel": parts})
        if parts != given and (
            (parts > 1 and batch.part_tokens < _MIN_PART_TOKENS)
            or (parts > 1 and config.data.on_bad_frame == "skip")
            or ranks_per_node % parts
            or batch.context_tokens % parts
            or unequal_heads(batch, shape.num_heads, shape.kv_heads) is not None
        ):
            continue
        try:
            split_batch(batch, ranks)
        except BatchError:
            continue
        found.append(parts)
    return found


def setting_of(
    config: Config, facts: RunFacts, cluster: Cluster, rank: int | None = None
) -> Setting:
    """Settings that determine a rank's memory. Raises BatchError."""
    micro_rows, accumulation = batch_of(config, cluster)
    return Setting(
        shape=config.model,
        vocab_size=facts.vocab_size,
        micro_batch_tokens=micro_rows * config.batch.part_tokens,
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
        is_hierarchical=config.zero.hierarchical,
        sequence_parallel=config.batch.sequence_parallel,
        lora=config.finetune.adapters,
    )


def traffic_of(
    config: Config, facts: RunFacts, cluster: Cluster, rank: int | None = None
) -> Traffic:
    """Traffic of a rank per step. Raises BatchError."""
    micro_rows, accumulation = batch_of(config, cluster)
    traffic = step_traffic(
        config.model,
        facts.vocab_size,
        ranks=cluster.ranks,
        accumulation_steps=accumulation,
        stage=config.zero.stage,
        precision=config.training.precision,
        optimizer=config.optimizer.name,
        rank=rank,
        has_fp32_accumulators=config.has_fp32_accumulators,
        reduces_once=config.reduces_once(accumulation),
        reduction=config.zero.reduction,
        shard_ranks=cluster.devices_per_node if config.zero.hierarchical else None,
        lora=config.finetune.adapters,
        recomputes=config.training.activation_checkpointing == "block",
    )
    ranks = cluster.ranks, cluster.devices_per_node
    return replace(traffic, sequence=sequence_exchange(config, micro_rows, accumulation, *ranks))


def calls_of(
    config: Config, facts: RunFacts, cluster: Cluster, rank: int | None = None
) -> StepCalls:
    """Number of collectives of a rank per step. Raises BatchError."""
    _, accumulation = batch_of(config, cluster)
    setting = setting_of(config, facts, cluster, rank)
    return step_calls(setting, config.optimizer, accumulation, config.zero.reduction)


def time_of(
    config: Config, facts: RunFacts, cluster: Cluster, rank: int | None = None
) -> StepTime | None:
    """Time of a step, by part; None on a CPU or a device of unknown rates. Raises BatchError."""
    peak = peak_flops(config, cluster.device)
    if peak is None or cluster.device.is_cpu:
        return None
    _, accumulation = batch_of(config, cluster)
    step = TimedStep(
        setting=setting_of(config, facts, cluster, rank),
        traffic=traffic_of(config, facts, cluster, rank),
        calls=calls_of(config, facts, cluster, rank),
        nodes=cluster.nodes,
        micro_batches=accumulation,
        attended_tokens=facts.attended_tokens,
        is_compiled=config.zero.stage < 3 and config.training.may_compile_on(False),
        peak_flops=peak,
    )
    return step_time(step, cluster.device)


def peak_flops(config: Config, device: Device) -> float | None:
    """Peak FLOP/s of a device in the run's precision."""
    return config.hardware.peak_flops or device.peak_flops(config.training.precision)


def _attention(config: Config, device: Device) -> Attention:
    """Backend that hardware.attention selects on a device; all kernels need the same memory."""
    can_flash = (
        not device.is_cpu
        and config.training.precision == "bf16"
        and config.model.head_size <= _MAX_FLASH_HEAD_DIM
    )
    return "flash_attn" if can_flash and config.hardware.attention != "sdpa" else "sdpa"
