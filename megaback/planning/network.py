"""Network traffic of a training step, and the rates at which it is sent. Loads no torch.

Bytes sent per rank with ring algorithms (Patarasuk and Yuan, 2009): for n bytes on W ranks, an
all-gather, reduce-scatter or reduce sends n (W - 1) / W, an all-reduce twice as much. The
collectives are those of DeepSpeed 0.19: stages 1 and 2 all-reduce (or reduce) gradients and gather
weights; stage 3 gathers weights for the forward pass and, if there are too many to keep, again for
the backward pass, and reduce-scatters gradients. Stages 2 and 3 reduce after every micro-batch,
or once per step.
"""

from dataclasses import dataclass

from megaback.config import ModelSection
from megaback.planning.devices import Device
from megaback.planning.flops import ModelSize
from megaback.planning.matrix_shares import matrix_share, matrix_shares
from megaback.planning.rates import assumed

_KEPT_ELEMENTS = 1_000_000_000
"""Weights that stage 3 keeps gathered until the backward pass: DeepSpeed's max_reuse_distance."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends per step."""

    gradient_bytes: float
    weight_bytes: float
    optimizer_bytes: float
    """Gathering Muon's matrices and scattering the results."""
    reduction: str
    """Collective that adds the gradients: all-reduce, reduce or reduce-scatter."""
    weight_passes: int = 1
    """Number of times that stage 3 gathers the weights per micro-batch."""

    @property
    def total(self) -> float:
        return self.gradient_bytes + self.weight_bytes + self.optimizer_bytes

    def seconds(self, device: Device, nodes: int, devices_per_node: int) -> float:
        """Seconds to send all of it, without latency and overlap."""
        rings = self.gradient_bytes + self.weight_bytes
        exchange = self.optimizer_bytes / exchange_rate(device, nodes)
        return rings / ring_rate(device, nodes, devices_per_node) + exchange


def ring_rate(device: Device, nodes: int, devices_per_node: int) -> float:
    """Bytes per second that a rank sends in a ring.

    Between nodes, NCCL has a ring per network card, which crosses each pair of nodes once with its
    part of the bytes, so that all cards of a node carry what one rank sends
    (NVIDIA/nccl#601, NVIDIA/nccl-tests#290).
    """
    link = device.link_bytes * assumed("LINK_SHARE")
    if nodes == 1:
        return link
    return min(link, devices_per_node * device.network_bytes * assumed("NETWORK_SHARE"))


def exchange_rate(device: Device, nodes: int) -> float:
    """Bytes per second that a rank sends to all others, each with a part of its own."""
    if nodes == 1:
        return device.link_bytes * assumed("LINK_SHARE")
    return device.network_bytes * assumed("NETWORK_SHARE")


def step_traffic(
    shape: ModelSection,
    vocab_size: int,
    *,
    ranks: int,
    accumulation_steps: int,
    stage: int,
    precision: str,
    optimizer: str,
    has_fp32_accumulators: bool = False,
    reduces_once: bool = False,
    reduction: str = "all_reduce",
    rank: int | None = None,
) -> Traffic:
    """Traffic of one rank per step, by default of the one that sends most."""
    size = ModelSize.of(shape, vocab_size)
    others = (ranks - 1) / ranks
    low = 2 if precision == "bf16" and stage else 4
    weights = low * size.total * others
    exchanged = 0.0
    if optimizer == "muon" and stage and ranks > 1:
        if rank is None:
            shares = matrix_shares(shape, ranks, stage)
        else:
            shares = (matrix_share(shape, ranks, stage, rank),)
        sent = max(share.sent_elements for share in shares)
        exchanged = float((2 if precision == "bf16" else 4) * sent)
    if stage == 0:
        return Traffic(2 * weights, 0.0, 0.0, "all-reduce")
    reductions = accumulation_steps if stage > 1 and not reduces_once else 1
    gradients = reductions * (4 if has_fp32_accumulators else low) * size.total * others
    if stage == 3:
        passes = 1 if size.total <= _KEPT_ELEMENTS else 2
        gathered = passes * accumulation_steps * weights
        return Traffic(gradients, gathered, exchanged, "reduce-scatter", passes)
    if reduction == "reduce":
        return Traffic(gradients, weights, exchanged, "reduce")
    return Traffic(2 * gradients, weights, exchanged, "all-reduce")
