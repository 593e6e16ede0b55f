"""Network traffic of a training step, and the rates at which it is sent. Loads no torch.

Bytes sent per rank with ring algorithms (Patarasuk and Yuan, 2009): for n bytes on W ranks, an
all-gather, reduce-scatter or reduce sends n (W - 1) / W, an all-reduce twice as much. The
collectives are those of DeepSpeed 0.19: stages 1 and 2 all-reduce (or reduce) gradients and gather
weights; stage 3 gathers weights for the forward pass and, if there are too many to keep, again for
the backward pass, and reduce-scatters gradients. Stages 2 and 3 reduce after every micro-batch,
or once per step.

With `zero.hierarchical`, stages 1 and 2 do so within a node, and all-reduce slices between nodes
once per step; stage 3 gathers weights from all ranks once per step, and within the node otherwise.
"""

from dataclasses import dataclass, replace

from megaback.config import ModelSection
from megaback.config_finetune import LoraSection
from megaback.planning.devices import Device
from megaback.planning.flops import ModelSize
from megaback.planning.matrix_shares import matrix_share, matrix_shares
from megaback.planning.memory import bucket_elements
from megaback.planning.parameters import Parameters
from megaback.planning.rates import assumed
from megaback.planning.sequence_exchange import NO_EXCHANGE, SequenceExchange
from megaback.planning.weight_gathers import persistent, weight_gathers

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
    node: "Traffic | None" = None
    """Part of it in collectives of the ranks of one node, if others are between nodes."""
    sequence: SequenceExchange = NO_EXCHANGE
    """Activations that ranks with parts of the same rows exchange."""

    @property
    def total(self) -> float:
        of_weights = self.gradient_bytes + self.weight_bytes + self.optimizer_bytes
        return of_weights + self.sequence.sent_bytes

    @property
    def between_nodes(self) -> "Traffic":
        """The rest of it, in collectives between nodes, without activations; all of it without that
        part."""
        if self.node is None:
            return replace(self, sequence=NO_EXCHANGE)
        return Traffic(
            self.gradient_bytes - self.node.gradient_bytes,
            self.weight_bytes - self.node.weight_bytes,
            self.optimizer_bytes - self.node.optimizer_bytes,
            "all-reduce" if self.node.gradient_bytes else self.reduction,
        )

    def rate_between(self, device: Device, nodes: int, devices_per_node: int) -> float:
        """Bytes per second that a rank sends in rings between nodes."""
        if self.has_replicas:  # each ring has one rank of a node, with the rank's own card
            return exchange_rate(device, nodes)
        return ring_rate(device, nodes, devices_per_node)

    @property
    def has_replicas(self) -> bool:
        """Whether nodes have all gradients, which they average over each other."""
        return self.node is not None and self.node.gradient_bytes > 0

    def durations(self, device: Device, nodes: int, devices_per_node: int) -> "TrafficTime":
        """Durations of sending all of it, without latency and overlap."""
        inner, between = self.node or Traffic(0.0, 0.0, 0.0, self.reduction), self.between_nodes
        link = ring_rate(device, 1, devices_per_node)
        ring = self.rate_between(device, nodes, devices_per_node)
        gradients = between.gradient_bytes / ring
        return TrafficTime(
            gradients_s=inner.gradient_bytes / link if self.has_replicas else gradients,
            replicas_s=gradients if self.has_replicas else 0.0,
            weights_s=inner.weight_bytes / link + between.weight_bytes / ring,
            exchange_s=inner.optimizer_bytes / link
            + between.optimizer_bytes / exchange_rate(device, nodes),
            sequence_s=self.sequence.sent_bytes
            / exchange_rate(device, 1 if self.sequence.is_within_node else nodes),
        )


@dataclass(frozen=True)
class TrafficTime:
    """Durations of a step's traffic."""

    gradients_s: float
    """Reduction of gradients, of all micro-batches."""
    replicas_s: float
    """Average over the replicas of other nodes, once per step."""
    weights_s: float
    exchange_s: float
    """Muon's exchange."""
    sequence_s: float
    """Exchange of activations."""

    @property
    def total_s(self) -> float:
        of_weights = self.gradients_s + self.replicas_s + self.weights_s
        return of_weights + self.exchange_s + self.sequence_s


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
    shard_ranks: int | None = None,
    lora: LoraSection | None = None,
    recomputes: bool = False,
) -> Traffic:
    """Traffic of one rank per step, by default of the one that sends most.

    `shard_ranks`: ranks of a node, if they shard hierarchically; all ranks by default.
    `recomputes`: whether blocks are recomputed, with LoRA.
    """
    size = ModelSize.of(shape, vocab_size, lora)
    low = 2 if precision == "bf16" and stage else 4
    if stage == 0:
        return Traffic(2 * low * size.trained * _others(ranks), 0.0, 0.0, "all-reduce")
    node = min(shard_ranks or ranks, ranks)
    high = 4 if has_fp32_accumulators else low
    reductions = accumulation_steps if stage > 1 and not reduces_once else 1

    def exchanged(within: int) -> float:
        if optimizer != "muon" or within == 1:
            return 0.0
        if rank is None:
            shares = matrix_shares(shape, within, stage)
        else:
            shares = (matrix_share(shape, within, stage, rank % within),)
        return float((2 if precision == "bf16" else 4) * max(one.sent_elements for one in shares))

    if stage == 3:
        passes = 1 if size.total <= _KEPT_ELEMENTS else 2
        gathers = passes * accumulation_steps
        gradients = reductions * high * size.trained * _others(ranks)
        whole, again = float(size.total), (gathers - 1.0) * size.total
        if lora is not None:
            whole, again = _lora_gathers(shape, vocab_size, lora, accumulation_steps, recomputes)
        kind, copied = "reduce-scatter", None
        if node < ranks:
            copied = Traffic(0.0, low * again * _others(node), 0.0, kind)
        repeated = low * again * _others(ranks) if copied is None else copied.weight_bytes
        weights = low * whole * _others(ranks) + repeated
        return Traffic(gradients, weights, exchanged(ranks), kind, passes, copied)
    times, kind = (1, "reduce") if reduction == "reduce" else (2, "all-reduce")
    gradients = times * reductions * high * size.trained * _others(node)
    inside = Traffic(gradients, low * size.trained * _others(node), exchanged(node), kind)
    if node == ranks:
        return inside
    gradients += 2 * high * size.trained / node * _others(ranks // node)
    return replace(inside, gradient_bytes=gradients, node=inside)


def _lora_gathers(
    shape: ModelSection,
    vocab_size: int,
    lora: LoraSection,
    accumulation_steps: int,
    recomputes: bool,
) -> tuple[float, float]:
    """Elements that stage 3 gathers with LoRA per step: for the first time, and again.

    Small factors are kept, and gathered once after their update. Frozen weights of a block that is
    recomputed are gathered twice.
    """
    parameters = Parameters.of(shape, vocab_size, lora)
    bucket = bucket_elements(sum(one.elements for one in parameters.in_order))
    first, later = (
        weight_gathers(shape, vocab_size, bucket, lora, is_first=is_first, recomputes=recomputes)
        for is_first in (True, False)
    )
    kept = sum(one.elements for one in persistent(parameters))
    again = first.again_elements + (accumulation_steps - 1) * later.again_elements
    return float(kept + first.whole_elements), float(again)


def _others(ranks: int) -> float:
    """Part of a tensor that a rank sends to gather or to reduce it."""
    return (ranks - 1) / ranks
