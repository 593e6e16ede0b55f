"""Before the first step: whether what the plan counts fits into the memory of every rank.

`megaback plan` and `submit` ask the same of devices that are not here. Here it is known what there
is, and only what cannot work is refused: of what the plan counts, that which is certain. Loads no
torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import NotEnoughMemoryError
from megaback.config import Config
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import CPU, Device
from megaback.planning.memory import Parts
from megaback.planning.plan import Cluster, advice_to_fit, memory_of

_MAX_OVERESTIMATE = 1.05
"""The plan over what real runs took was at most 1.04: benchmarks/README.md."""


@dataclass(frozen=True)
class AvailableMemory:
    """Where a rank is, and what memory there is."""

    host: str
    device: str
    """`cpu`, or the GPU's name."""
    memory_bytes: int
    """Memory of its GPU or, on a CPU, of its host, which all ranks there share."""


def require_memory(config: Config, vocab_size: int, rooms: Sequence[AvailableMemory]) -> None:
    """Raise NotEnoughMemoryError, with the smallest change that fits, for what cannot fit.

    `rooms` are those of all ranks.
    """
    if config.hardware.memory_check == "off":
        return
    ranks_on = Counter(room.host for room in rooms)
    shares = [
        room.memory_bytes / (ranks_on[room.host] if room.device == CPU else 1) for room in rooms
    ]
    there, tightest = min(zip(shares, rooms, strict=True), key=lambda pair: pair[0])
    device = Device(
        name=tightest.device,
        memory_bytes=there,
        bf16_flops=None,
        fp32_flops=None,
        link_bytes=0.0,
        network_bytes=0.0,
    )
    cluster = Cluster(1, len(rooms), device)
    facts = RunFacts(
        vocab_size=vocab_size, attended_tokens=0.0, total_tokens=None, shard_bytes=None, notes=()
    )
    memory = memory_of(config, facts, cluster)
    needed = certain_bytes(memory.parts, config.training.compile)
    if needed <= there:
        return
    advice = advice_to_fit(config, facts, cluster, can_add_nodes=False)
    raise NotEnoughMemoryError(
        f"{config.run} needs {needed / 1e9:.1f} GB or more for each of {len(rooms)} processes, and "
        f"{tightest.host} ({tightest.device}) has {there / 1e9:.1f} GB for each (most at: "
        f"{memory.moment}); {advice}; hardware.memory_check=off starts it all the same"
    )


def certain_bytes(parts: Parts, is_compiled: bool) -> float:
    """What a rank takes in any case: without reserves; compiled code may keep fewer activations."""
    uncertain = parts.reserve + (parts.activations + parts.logits if is_compiled else 0.0)
    return (parts.total - uncertain) / _MAX_OVERESTIMATE
