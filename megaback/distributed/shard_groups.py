"""Groups of ranks over which ZeRO shards: all ranks, or with `zero.hierarchical` those of a node.

DeepSpeed's ZeRO at stages 1 and 2 gets the ranks of a node as if they were all. Before it computes
the norm of the gradient, each rank averages its slice over the ranks with the same slice on other
nodes, so that all nodes make the same update. Reasons, and what of ZeRO++ is not used:
docs/decisions/0075-hierarchical-zero.md.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import LaunchError
from megaback.config import ZeroSection
from megaback.distributed.rendezvous import node_name, ranks_per_node
from megaback.distributed.world import World


@dataclass(frozen=True)
class ShardGroup:
    """The ranks that share one copy of the optimizer state with this rank.

    Groups are of consecutive ranks, and every other group has a replica of the state.
    """

    rank: int
    """Rank within the group."""
    size: int
    num_replicas: int = 1
    """Number of groups."""
    group: Any = None
    """Process group; None: all ranks."""
    replica_group: Any = None
    """Process group of the ranks with the same slices, one of each replica; None: this one only."""


def whole_group() -> ShardGroup:
    """The shard group of all ranks."""
    return ShardGroup(dist.get_rank(), dist.get_world_size())


def node_group(timeout_s: float) -> ShardGroup:
    """The shard group of this rank's node. Collective. Raises LaunchError.

    `timeout_s`: that of its collectives.
    """
    rank, world_size, size = dist.get_rank(), dist.get_world_size(), ranks_per_node()
    if size == world_size:
        return whole_group()
    nodes = [list(range(first, first + size)) for first in range(0, world_size, size)]
    timeout = timedelta(seconds=timeout_s)
    # All ranks create all groups, in the same order.
    groups = [dist.new_group(ranks, timeout, group_desc="ranks of a node") for ranks in nodes]
    places = [
        dist.new_group([ranks[place] for ranks in nodes], timeout, group_desc="slice of a replica")
        for place in range(size)
    ]
    node, place = divmod(rank, size)
    return ShardGroup(place, size, len(nodes), groups[node], places[place])


def require_equal_nodes(section: ZeroSection, world: World) -> None:
    """Check, with `zero.hierarchical`, that all nodes have as many ranks. Collective.

    Ends every rank with a LaunchError.
    """
    if section.hierarchical:
        here = (node_name(), world.run_collectively(ranks_per_node))
        world.run_collectively(_require_equal, world.gather(here, tuple[str, int]))


def _require_equal(nodes: Sequence[tuple[str, int]]) -> None:
    """`nodes`: name of each rank's node, and its number of ranks. Raises LaunchError."""
    _, size = nodes[0]
    num_on_node = Counter(name for name, _ in nodes)
    for name, local_size in nodes:
        # Nodes may share a name, as containers do; then it has a multiple of their ranks.
        if num_on_node[name] % local_size:
            raise LaunchError(
                "zero.hierarchical needs the number of ranks of every node: LOCAL_SIZE says "
                f"{local_size} on {name}, and {num_on_node[name]} of the run's {len(nodes)} are "
                "there; set LOCAL_SIZE to that, start the ranks by `megaback train`, srun or "
                "torchrun, or set zero.hierarchical=false"
            )
    for name, other in nodes:
        if other != size:
            raise LaunchError(
                f"zero.hierarchical needs the same number of ranks on every node, and "
                f"{nodes[0][0]} has {size} but {name} {other}; start as many on each, or set "
                "zero.hierarchical=false"
            )
    for first in range(0, len(nodes), size):
        names = [name for name, _ in nodes[first : first + size]]
        if len(set(names)) > 1:
            raise LaunchError(
                f"zero.hierarchical needs the {size} ranks of each node to be consecutive, and "
                f"ranks from {first} on are on {', '.join(names)}; start them node by node "
                "(`srun --distribution=block`), or set zero.hierarchical=false"
            )


@contextmanager
def sharding_within(shards: ShardGroup, stage: int) -> Iterator[None]:
    """Make DeepSpeed's engine, which is started within, shard over a group.

    At stage 3 it shards over all ranks, and keeps copies of the weights within the group.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups

    # DeepSpeed would create it once, for all engines of a process.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = shards.group if stage == 3 else None
    usual = DeepSpeedEngine._configure_zero_optimizer

    def configure(engine: Any, optimizer: Any) -> Any:
        everyone = engine.seq_data_parallel_group
        if shards.group is not None and stage < 3:
            engine.seq_data_parallel_group = shards.group
        try:
            return usual(engine, optimizer)
        finally:
            engine.seq_data_parallel_group = everyone

    DeepSpeedEngine._configure_zero_optimizer = configure
    try:
        yield
    finally:
        DeepSpeedEngine._configure_zero_optimizer = usual


def average_over_replicas(zero: Any, shards: ShardGroup) -> None:
    """Make ZeRO's optimizer at stages 1 and 2 average its gradients over the replicas.

    They are averaged once per step, before the norm is computed. The replicas also agree on the
    norm: sums of different nodes may differ in the last bit, and so would their weights.
    """
    usual = zero.scaled_global_norm

    def norm_of_average(*arguments: Any, **options: Any) -> Tensor:
        for group in zero.averaged_gradients.values():
            flat = getattr(group, "flat_partition", None)
            _average(group if flat is None else [flat], shards, zero.reduce_bucket_size)
        norm: Tensor = usual(*arguments, **options)
        dist.all_reduce(norm, dist.ReduceOp.MAX, shards.replica_group)
        return norm

    zero.scaled_global_norm = norm_of_average


def _average(parts: Sequence[Tensor], shards: ShardGroup, bucket_elements: int) -> None:
    """Average contiguous tensors over the replicas, in place, in buckets."""
    for bucket in _buckets(parts, bucket_elements):
        joined = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
        joined.div_(shards.num_replicas)
        dist.all_reduce(joined, group=shards.replica_group)
        if len(bucket) > 1:
            averages = torch.split(joined, [len(piece) for piece in bucket])
            for piece, average in zip(bucket, averages, strict=True):
                piece.copy_(average)


def _buckets(parts: Sequence[Tensor], max_elements: int) -> Iterator[list[Tensor]]:
    """Flat views of the tensors, joined or split into buckets."""
    bucket: list[Tensor] = []
    for part in parts:
        for piece in torch.split(part.view(-1), max_elements):
            if bucket and sum(map(len, bucket)) + len(piece) > max_elements:
                yield bucket
                bucket = []
            bucket.append(piece)
    if bucket:
        yield bucket
