"""Number of collectives of a training step, as DeepSpeed 0.19 and Muon make them. Loads no torch.

Gradients are reduced in buckets, which are filled in the order of the backward pass at stages 2
and 3, and in that of the optimizer's groups otherwise. Weights are gathered by group at stages 1
and 2, and as in `weight_gathers` at stage 3.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from megaback.config import OptimizerSection
from megaback.planning.matrix_shares import partition_elements
from megaback.planning.memory import (
    GROUP_ELEMENTS,
    WHOLE_REDUCED_ELEMENTS,
    Setting,
    bucket_elements,
)
from megaback.planning.network import Traffic
from megaback.planning.parameters import Parameter, Parameters
from megaback.planning.weight_gathers import persistent, weight_gathers


@dataclass(frozen=True, kw_only=True)
class StepCalls:
    """Number of collectives of a rank per step, by use."""

    gradients: int = 0
    """Reductions of buckets, of all micro-batches."""
    replicas: int = 0
    """Averages over the replicas of other nodes, and the agreement on the norm."""
    weights: int = 0
    """Gathers from all ranks that share the weights; at stage 3, during the passes."""
    copied_weights: int = 0
    """Gathers from the copies within a node."""
    updated_weights: int = 0
    """Gathers of the small weights that stage 3 keeps, after their update."""
    exchange: int = 0
    """Muon's exchange of matrices."""
    norms: int = 0
    """Sums of squared gradients, one per group of the optimizer; at stage 0 one, for clipping."""
    losses: int = 0
    """Sums of losses and targets over all ranks."""

    def by_group(self, traffic: Traffic) -> dict[tuple[str, str], int]:
        """Numbers by group and kind, as in `rehearsal.report.Traffic`."""
        exchange = traffic.sequence
        parts = Counter(self._of_weights(traffic))
        if exchange.calls:
            parts["engine" if exchange.is_of_all_ranks else "node", "all-to-all"] += exchange.calls
        return {key: number for key, number in parts.items() if number}

    def by_place(self, traffic: Traffic, nodes: int) -> dict[str, dict[str, int]]:
        """Numbers by kind, within a node and between nodes."""
        places: dict[str, Counter[str]] = {"within_node": Counter(), "between_nodes": Counter()}

        def at(is_within: bool) -> Counter[str]:
            return places["within_node" if is_within else "between_nodes"]

        for (group, kind), number in self._of_weights(traffic).items():
            at(nodes == 1 or group == "node")[kind] += number
        exchange = traffic.sequence
        at(exchange.is_within_node)["all-to-all"] += exchange.calls
        return {
            place: {kind: number for kind, number in numbers.items() if number}
            for place, numbers in places.items()
        }

    def _of_weights(self, traffic: Traffic) -> Counter[tuple[str, str]]:
        """Numbers by group and kind, without exchanges of activations."""
        shards = "node" if traffic.has_replicas else "engine"
        found: Counter[tuple[str, str]] = Counter()
        for group, kind, number in (
            (shards, traffic.reduction, self.gradients),
            (shards, "all-reduce", self.norms),
            ("engine", "all-reduce", self.replicas + self.losses),
            (shards, "all-gather", self.weights + self.updated_weights),
            ("node", "all-gather", self.copied_weights),
            (shards, "all-to-all", self.exchange),
        ):
            found[group, kind] += number
        return found


def step_calls(
    setting: Setting, section: OptimizerSection, accumulation_steps: int, reduction: str
) -> StepCalls:
    """Numbers of a rank per step; none if it is alone."""
    if setting.ranks == 1:
        return StepCalls()
    parameters = Parameters.of(setting.shape, setting.vocab_size, setting.lora)
    groups = parameters.groups(setting.shape, section)
    bucket = bucket_elements(_elements(parameters.trained))
    is_backward = (setting.stage > 1 and not setting.reduces_once) or (
        setting.stage == 1 and setting.overlaps
    )
    in_groups = [one for group in groups for one in group]
    order = parameters.in_backward_order if is_backward else in_groups
    filled = list(_buckets(order, bucket))
    times = accumulation_steps if setting.stage > 1 and not setting.reduces_once else 1
    if setting.stage == 0:
        gradients = _flushes((one.elements for one in parameters.trained), WHOLE_REDUCED_ELEMENTS)
        return StepCalls(gradients=gradients, norms=int(section.gradient_clip > 0), losses=1)
    if setting.stage == 3:
        return replace(
            _stage3_calls(setting, parameters, groups, accumulation_steps),
            gradients=times * len(filled),
        )
    ranks = setting.shard_ranks
    replicas = 0
    if ranks < setting.ranks:
        averages = sum(_averages(setting, group, bucket) for group in groups)
        replicas = averages + 1
    if ranks == 1:
        return StepCalls(replicas=replicas, losses=1)
    places = _places(groups, ranks)
    return StepCalls(
        gradients=times * sum(_reductions(part, places, bucket, reduction) for part in filled),
        replicas=replicas,
        weights=len(groups),
        exchange=2 * (setting.optimizer == "muon"),
        norms=len(groups),
        losses=1,
    )


def _stage3_calls(
    setting: Setting,
    parameters: Parameters,
    groups: Sequence[Sequence[Parameter]],
    accumulation_steps: int,
) -> StepCalls:
    """Numbers at stage 3, without the reductions."""
    bucket = bucket_elements(_elements(parameters.in_order))
    recomputes = setting.checkpointing == "block"
    first, later = (
        weight_gathers(
            setting.shape,
            setting.vocab_size,
            bucket,
            setting.lora,
            is_first=is_first,
            recomputes=recomputes,
        )
        for is_first in (True, False)
    )
    again = first.again + (accumulation_steps - 1) * later.again
    calls = first.calls + (accumulation_steps - 1) * later.calls
    has_copies = setting.is_hierarchical and setting.ranks_per_node < setting.ranks
    is_matrix = [group[0].kind == "matrix" and setting.optimizer == "muon" for group in groups]
    parts = [_update_parts(group, setting.ranks) for group in groups]
    return StepCalls(
        weights=first.whole if has_copies else calls,
        copied_weights=again if has_copies and setting.ranks_per_node > 1 else 0,
        updated_weights=len(persistent(parameters)),
        exchange=2 * sum(count for count, is_one in zip(parts, is_matrix, strict=True) if is_one),
        norms=sum(parts),
        losses=1,
    )


def _buckets(order: Iterable[Parameter], max_elements: int) -> Iterator[list[Parameter]]:
    """Buckets of at most `max_elements`, or of one larger gradient."""
    bucket: list[Parameter] = []
    for one in order:
        if bucket and _elements(bucket) + one.elements > max_elements:
            yield bucket
            bucket = []
        bucket.append(one)
    yield bucket


def _elements(parameters: Iterable[Parameter]) -> int:
    return sum(one.elements for one in parameters)


def _flushes(lengths: Iterable[int], max_elements: int) -> int:
    """Number of buckets that end with the first tensor past `max_elements`."""
    count = filled = 0
    for length in lengths:
        filled += length
        if filled > max_elements:
            count, filled = count + 1, 0
    return count + (filled > 0)


_Place = tuple[int, int]
"""Offset of a parameter in its group, and elements of a rank's slice of the group."""


def _places(groups: Iterable[Sequence[Parameter]], ranks: int) -> dict[Parameter, _Place]:
    found: dict[Parameter, _Place] = {}
    for group in groups:
        partition, offset = partition_elements(_elements(group), ranks), 0
        for one in group:
            found[one] = offset, partition
            offset += one.elements
    return found


def _pieces(one: Parameter, place: _Place) -> Iterator[tuple[int, int]]:
    """Ranks that have a part of a parameter, and the part's elements."""
    start, partition = place
    for rank in range(start // partition, (start + one.elements - 1) // partition + 1):
        first = max(start, rank * partition)
        yield rank, min(start + one.elements, (rank + 1) * partition) - first


def _reductions(
    bucket: Sequence[Parameter], places: dict[Parameter, _Place], max_elements: int, reduction: str
) -> int:
    """Reductions of a bucket: one, or one to each rank with a part of it."""
    pieces = [piece for one in bucket for piece in _pieces(one, places[one])]
    if reduction == "reduce":
        return len({rank for rank, _ in pieces})
    return _flushes((length for _, length in pieces), max_elements)


def _averages(setting: Setting, group: Sequence[Parameter], max_elements: int) -> int:
    """Averages of a rank's slice of a group over the replicas, by default of the most of them."""
    ranks = setting.shard_ranks
    partition = partition_elements(_elements(group), ranks)
    if setting.has_fp32_accumulators:
        return ceil(partition / max_elements)
    slices: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    places = _places([group], ranks)
    for one in group:
        for rank, length in _pieces(one, places[one]):
            slices[rank].append(length)
    chosen = range(ranks) if setting.shard_rank is None else [setting.shard_rank]
    # The last slice is padded.
    return max(
        _joined([*slices[rank], partition - sum(slices[rank])], max_elements) for rank in chosen
    )


def _joined(lengths: Iterable[int], max_elements: int) -> int:
    """Number of buckets of tensors, which are cut into pieces of at most `max_elements`."""
    count, filled = 0, max_elements
    for length in lengths:
        for first in range(0, length, max_elements):
            piece = min(length - first, max_elements)
            if filled + piece > max_elements:
                count, filled = count + 1, 0
            filled += piece
    return count


def _update_parts(group: Iterable[Parameter], ranks: int) -> int:
    """Number of parts in which stage 3 updates a group."""
    lengths = (ceil(one.elements / ranks) for one in group)
    return _flushes(lengths, GROUP_ELEMENTS - 1)
