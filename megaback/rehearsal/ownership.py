"""Check that the ranks' slices are all trained parameters, each element once."""

from collections.abc import Iterable, Sequence
from typing import Any

from megaback.checkpoints.state import Partition, partitions_of
from megaback.optim.zero_matrices import choose_owners
from megaback.rehearsal.report import Ownership


def ownership_of(engine: Any) -> Ownership:
    """Parameters that each rank of the shard group updates, from this rank's engine."""
    num_ranks = engine.shards.size
    lengths = {
        name: int(getattr(weight, "ds_numel", weight.numel()))
        for name, weight in engine.module.named_parameters()
        if weight.requires_grad
    }
    total = sum(lengths.values())
    if engine.zero_optimization_stage() == 0:
        return Ownership(
            parameters=total,
            min_weights=total,
            max_weights=total,
            matrices=0,
            ranks_without_matrices=0,
            first_without_matrices=None,
            problems=(),
        )
    partitions = partitions_of(engine)
    counts = [
        sum(one.length for part in partitions for one in part.slices[rank])
        for rank in range(num_ranks)
    ]
    owners = matrix_owners(engine)
    without = sorted(set(range(num_ranks)) - set(owners)) if owners else []
    return Ownership(
        parameters=total,
        min_weights=min(counts),
        max_weights=max(counts),
        matrices=len(owners),
        ranks_without_matrices=len(without),
        first_without_matrices=without[0] if without else None,
        problems=tuple(uncovered(partitions, lengths)),
    )


def matrix_owners(engine: Any) -> list[int]:
    """Rank of the shard group that orthogonalizes each of Muon's matrices, at stages 1 to 3."""
    shapes = {
        name: tuple(getattr(weight, "ds_shape", weight.shape))
        for name, weight in engine.module.named_parameters()
    }
    return [
        owner
        for part in partitions_of(engine)
        if part.is_orthogonalized
        for owner in choose_owners([shapes[name] for name in part.names], part.slices)
    ]


def uncovered(partitions: Sequence[Partition], lengths: dict[str, int]) -> Iterable[str]:
    """Problems of parameters whose elements are not each owned by exactly one rank.

    `lengths`: number of elements of each parameter.
    """
    names = [name for part in partitions for name in part.names]
    if sorted(names) != sorted(lengths):
        yield "the parameters of the optimizer are not those of the model, each once"
    for part in partitions:
        for number, name in enumerate(part.names):
            runs = sorted(
                (of_rank[number].matrix_start, of_rank[number].length) for of_rank in part.slices
            )
            end = 0
            for start, length in runs:
                if length and start != end:
                    yield f"{name}: elements {min(start, end):,} to {max(start, end):,}"
                end = max(end, start + length)
            if end != lengths.get(name, end):
                yield f"{name}: {end:,} of {lengths[name]:,} elements are owned"
