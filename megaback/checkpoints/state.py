"""Weights and optimizer state by parameter, independent of world size and ZeRO stage.

ZeRO cuts weights and optimizer state into flat slices of its own layout. Here a slice is a sequence
of runs, each of consecutive elements of a named parameter, so that any number of ranks at any stage
can load what another has saved. The fp32 weights are saved; bf16 copies are derived from them.

A run's key is `KIND:PARAMETER:START`: elements from START on in the parameter's flat order. KIND is
`weight`, or the optimizer's `exp_avg`, `exp_avg_sq` (AdamW) or `momentum` (Muon).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaback.checkpoints.saved_runs import WEIGHT, RunIndex, SavedState, index_of
from megaback.optim.zero_matrices import Slice, slices_of_each, slices_of_flat

_ADAMW_KINDS = ("exp_avg", "exp_avg_sq")
_MUON_KINDS = ("momentum",)


def _kinds(*, is_orthogonalized: bool) -> tuple[str, ...]:
    return _MUON_KINDS if is_orthogonalized else _ADAMW_KINDS


@dataclass(frozen=True)
class Holding:
    """Tensor that the optimizer updates, and the runs of parameters in its flat order."""

    tensor: Tensor
    is_orthogonalized: bool
    runs: tuple[tuple[str, Slice], ...]

    def kinds(self) -> tuple[str, ...]:
        """Kinds of optimizer state of this tensor."""
        return _kinds(is_orthogonalized=self.is_orthogonalized)


@dataclass(frozen=True)
class Partition:
    """Flat tensor of this rank, and its named parameters: `slices[rank][parameter]`.

    Ranks are those of the shard group (`distributed.shard_groups`), or all.
    """

    tensor: Tensor
    is_orthogonalized: bool
    names: tuple[str, ...]
    slices: list[list[Slice]]


def partitions_of(engine: Any) -> list[Partition]:
    """Flat tensors into which ZeRO's stages 1 to 3 cut the parameters.

    With the slices of all ranks of the shard group.
    """
    num_ranks = engine.shards.size
    names = {id(weight): name for name, weight in engine.module.named_parameters()}
    zero, groups = engine.optimizer, engine.basic_optimizer.param_groups
    partitions = []
    if engine.zero_optimization_stage() == 3:
        for number, weights in enumerate(zero.fp16_groups):
            group = groups[zero.sub_group_to_group_id[number]]
            slices = slices_of_each(
                [weight.partition_numel() for weight in weights],
                [weight.ds_numel for weight in weights],
                num_ranks,
            )
            flat = zero.fp32_partitioned_groups_flat[number]
            named = tuple(names[id(weight)] for weight in weights)
            partitions.append(Partition(flat, group["orthogonalize"], named, slices))
    else:
        for number, weights in enumerate(zero.round_robin_bit16_groups):
            slices = slices_of_flat(
                zero.round_robin_bit16_offsets[number],
                [weight.numel() for weight in weights],
                int(zero.partition_size[number]),
                num_ranks,
            )
            flat = zero.single_partition_of_fp32_groups[number]
            named = tuple(names[id(weight)] for weight in weights)
            partitions.append(Partition(flat, groups[number]["orthogonalize"], named, slices))
    return partitions


def holdings_of(engine: Any) -> list[Holding]:
    """Tensors that this rank updates: all weights at stage 0, its slices at the others."""
    if engine.zero_optimization_stage():
        return [
            Holding(
                one.tensor,
                one.is_orthogonalized,
                tuple(zip(one.names, one.slices[engine.shards.rank], strict=True)),
            )
            for one in partitions_of(engine)
        ]
    names = {id(weight): name for name, weight in engine.module.named_parameters()}
    return [
        Holding(weight, group["orthogonalize"], ((names[id(weight)], _whole(weight)),))
        for group in engine.basic_optimizer.param_groups
        for weight in group["params"]
    ]


def named_state(engine: Any, rank: int, world_size: int) -> dict[str, Tensor]:
    """Views of the fp32 weights and optimizer state that this rank saves, by key.

    The parts of the ranks are disjoint, and together complete.
    """
    state: dict[str, Tensor] = {}
    for one in _saved_partitions(engine, world_size):
        for kind, tensor in _tensors_of(one, engine).items():
            flat = tensor.reshape(-1)
            for name, run in zip(one.names, one.slices[rank], strict=True):
                if run.length:
                    view = flat[run.local_start : run.local_start + run.length]
                    state[f"{kind}:{name}:{run.matrix_start}"] = view
    return state


def saved_index(engine: Any, world_size: int) -> RunIndex:
    """Index of the runs that all ranks save by `named_state`, known without communication."""
    return index_of(
        (rank, f"{kind}:{name}", run.matrix_start, run.length)
        for one in _saved_partitions(engine, world_size)
        for kind in _tensors_of(one, engine)
        for rank, of_rank in enumerate(one.slices)
        for name, run in zip(one.names, of_rank, strict=True)
        if run.length
    )


def _saved_partitions(engine: Any, world_size: int) -> list[Partition]:
    """Partitions to save, with the slices of all ranks.

    Of a slice that several ranks have, each saves a part. At stage 0, where every rank has
    everything, each saves some weights.
    """
    if engine.zero_optimization_stage():
        num_replicas = world_size // engine.shards.size
        partitions = partitions_of(engine)
        return [_split(one, num_replicas) for one in partitions] if num_replicas > 1 else partitions
    return [
        Partition(
            holding.tensor,
            holding.is_orthogonalized,
            (holding.runs[0][0],),
            [
                [holding.runs[0][1] if rank == number % world_size else Slice(0, 0, 0)]
                for rank in range(world_size)
            ],
        )
        for number, holding in enumerate(holdings_of(engine))
    ]


def _split(one: Partition, num_replicas: int) -> Partition:
    """A partition whose slices are split over replicas: `slices[rank]` of all ranks of all."""
    length = -(-one.tensor.numel() // num_replicas)
    slices = [
        [_part(run, replica * length, (replica + 1) * length) for run in of_rank]
        for replica in range(num_replicas)
        for of_rank in one.slices
    ]
    return replace(one, slices=slices)


def _part(run: Slice, local_start: int, local_stop: int) -> Slice:
    """The elements of a slice between two positions of the flat tensor."""
    first = max(run.local_start, local_start)
    length = max(min(run.local_start + run.length, local_stop) - first, 0)
    return Slice(first, run.matrix_start + first - run.local_start, length)


def _tensors_of(one: Partition, engine: Any) -> dict[str, Tensor]:
    """The fp32 weights of a partition, and the optimizer state that it has, by kind."""
    state = engine.basic_optimizer.state.get(one.tensor, {})
    kinds = _kinds(is_orthogonalized=one.is_orthogonalized)
    return {WEIGHT: one.tensor.detach()} | {kind: state[kind] for kind in kinds if kind in state}


@torch.no_grad()
def load_weights(engine: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole weights in fp32 into those that this rank updates.

    `refresh_copies` then updates the model, on all ranks together.
    """
    parts: dict[str, list[tuple[Tensor, Slice]]] = {}
    for holding in holdings_of(engine):
        for name, run in holding.runs:
            parts.setdefault(name, []).append((holding.tensor.data.view(-1), run))
    for name, weight in weights:
        flat = weight.reshape(-1)
        for target, run in parts.pop(name):
            target[run.local_start : run.local_start + run.length].copy_(
                flat[run.matrix_start : run.matrix_start + run.length]
            )
    assert not parts, f"no weights of {sorted(parts)}"


def num_updates(engine: Any) -> int:
    """Number of updates by AdamW, without skipped steps."""
    counts = [state["step"] for state in engine.basic_optimizer.state.values() if "step" in state]
    return int(max(counts, default=0))


class StateDiffersError(Exception):
    """Error for a checkpoint whose state differs from an engine's; `differing` lists how."""

    def __init__(self, differing: Sequence[str]) -> None:
        super().__init__("; ".join(differing))
        self.differing = differing


@torch.no_grad()
def restore(engine: Any, saved: SavedState, updates: int) -> None:
    """Restore the saved state into an engine that has taken no step; `refresh_copies` comes next.

    Raises StateDiffersError, before anything is changed, unless the saved state has exactly the
    elements of the engine's.
    """
    optimizer = engine.basic_optimizer
    holdings = holdings_of(engine)
    differing = saved.differences(_expected(engine, holdings, has_state=updates > 0))
    if differing:
        raise StateDiffersError(differing)
    wanted = []
    for holding in holdings:
        tensor = holding.tensor
        tensors = {WEIGHT: tensor.data}
        if updates:
            state = {kind: torch.zeros_like(tensor) for kind in holding.kinds()}
            tensors |= state
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(updates), device=tensor.device)
            optimizer.state[tensor] = state
        for kind, target in tensors.items():
            flat = target.view(-1)
            for name, run in holding.runs:
                if run.length:
                    part = flat[run.local_start : run.local_start + run.length]
                    wanted.append((kind, name, run.matrix_start, part))
    saved.read_all(wanted)


def _expected(
    engine: Any, holdings: Iterable[Holding], has_state: bool
) -> dict[tuple[str, str], int]:
    """Number of elements of every parameter's weight and optimizer state, by kind and name.

    Each rank's holdings name all parameters, even those of which it has no element.
    """
    sizes = {
        name: int(getattr(weight, "ds_numel", weight.numel()))
        for name, weight in engine.module.named_parameters()
    }
    return {
        (kind, name): sizes[name]
        for holding in holdings
        for name, _ in holding.runs
        for kind in (WEIGHT, *(holding.kinds() if has_state else ()))
    }


@torch.no_grad()
def refresh_copies(engine: Any) -> None:
    """Update the model's weights from the fp32 slices. Collective."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
            if flat.numel():
                zero.fp16_partitioned_groups_flat[number].data.copy_(flat.data)
            weights = zero.fp16_partitioned_groups[number]
            views = zero.unflatten(zero.fp16_partitioned_groups_flat[number], weights)
            for weight, view in zip(weights, views, strict=True):
                weight.data = view.data
        persistent = zero.persistent_parameters  # small ones, whole on every rank
        if persistent:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
        zero.invalidate_secondary_tensor()  # copies of the weights as they were before


def _whole(weight: Tensor) -> Slice:
    return Slice(0, 0, weight.numel())
