"""Memory check before the first step: whether the planned memory fits every rank.

`megaback plan` and `submit` check devices of another machine. Here the available memory is known,
and a run is refused only if the certain part of the estimate does not fit. Loads no torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import NotEnoughMemoryError
from megaback.config import Config
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import CPU, Device
from megaback.planning.memory import Parts, RankMemory
from megaback.planning.plan import advice_to_fit, memory_of
from megaback.planning.run_settings import Cluster

_MAX_OVERESTIMATE = 1.05
"""Maximum ratio of estimated to measured memory; 1.04 was found: benchmarks/README.md."""


@dataclass(frozen=True)
class AvailableMemory:
    """Memory available to a rank."""

    host: str
    device: str
    """`cpu`, or the GPU's name."""
    memory_bytes: int
    """Memory of the rank's GPU or, on a CPU, of its host, which all ranks there share."""


def require_memory(config: Config, vocab_size: int, rooms: Sequence[AvailableMemory]) -> None:
    """Raise NotEnoughMemoryError, with the smallest change that fits, if a run cannot fit.

    `rooms`: the memory available to each rank, for all ranks.
    """
    if config.hardware.memory_check == "off":
        return
    ranks_on = Counter(room.host for room in rooms)
    shares = [
        room.memory_bytes / (ranks_on[room.host] if room.device == CPU else 1) for room in rooms
    ]
    there, tightest = min(zip(shares, rooms, strict=True), key=lambda pair: pair[0])
    nodes = len(ranks_on) if len(rooms) % len(ranks_on) == 0 else 1
    facts, cluster = _known(vocab_size, len(rooms), nodes, tightest.device, there)
    memory = memory_of(config, facts, cluster)
    is_compiled = config.training.may_compile_on(cluster.device.is_cpu)
    needed = certain_bytes(memory.parts, is_compiled)
    if needed <= there:
        return
    advice = advice_to_fit(config, facts, cluster, can_add_nodes=False)
    raise NotEnoughMemoryError(
        f"{config.run} needs at least {needed / 1e9:.1f} GB for each of {len(rooms)} processes, "
        f"but {tightest.host} ({tightest.device}) has {there / 1e9:.1f} GB for each (peak: "
        f"{memory.moment}); {advice}; hardware.memory_check=off skips this check"
    )


def planned_memory(
    config: Config, vocab_size: int, ranks: int, device: str, nodes: int = 1
) -> RankMemory:
    """Memory of a rank by the plan of a run on devices of this name. Raises BatchError."""
    return memory_of(config, *_known(vocab_size, ranks, nodes, device, 0.0))


def _known(
    vocab_size: int, ranks: int, nodes: int, device_name: str, memory_bytes: float
) -> tuple[RunFacts, Cluster]:
    """Facts and cluster of a plan that is for memory only."""
    device = Device(
        name=device_name,
        memory_bytes=memory_bytes,
        bf16_flops=None,
        fp32_flops=None,
        link_bytes=0.0,
        network_bytes=0.0,
    )
    facts = RunFacts(
        vocab_size=vocab_size, attended_tokens=0.0, total_tokens=None, shard_bytes=None, notes=()
    )
    return facts, Cluster(nodes, ranks // nodes, device)


def certain_bytes(parts: Parts, is_compiled: bool) -> float:
    """Lower bound of a rank's memory, without reserves; compiled code may save less activations."""
    uncertain = parts.reserve + (parts.activations + parts.logits if is_compiled else 0.0)
    return (parts.total - uncertain) / _MAX_OVERESTIMATE
