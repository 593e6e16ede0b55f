"""Weights and optimizer state by parameter, independent of world size and ZeRO stage.

ZeRO cuts weights and optimizer state into flat slices of its own layout. Here a slice is a sequence
of runs, each of consecutive elements of a named parameter, so that any number of ranks at any stage
can load what another has saved. The fp32 weights are saved; bf16 copies are derived from them.

A run's key is `KIND:PARAMETER:START`: elements from START on in the parameter's flat order. KIND is
`weight`, or the optimizer's `exp_avg`, `exp_avg_sq` (AdamW) or `momentum` (Muon).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.checked_json import briefly
from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.safetensors_file import OpenFiles, TensorFile
from megaback.optim.zero_matrices import Slice, slices_of_each, slices_of_flat

WEIGHT = "weight"
_RUN_KEY = re.compile(r"([a-z_]+):([^:]+):(\d{1,18})")
_ADAMW_KINDS = ("exp_avg", "exp_avg_sq")
_MUON_KINDS = ("momentum",)


@dataclass(frozen=True)
class Holding:
    """Tensor that the optimizer updates, and the runs of parameters in its flat order."""

    tensor: Tensor
    is_orthogonalized: bool
    runs: tuple[tuple[str, Slice], ...]

    def kinds(self) -> tuple[str, ...]:
        """Kinds of optimizer state of this tensor."""
        return _MUON_KINDS if self.is_orthogonalized else _ADAMW_KINDS


@dataclass(frozen=True)
class Partition:
    """Flat tensor of this rank, and its named parameters: `slices[rank][parameter]`."""

    tensor: Tensor
    is_orthogonalized: bool
    names: tuple[str, ...]
    slices: list[list[Slice]]


def partitions_of(engine: Any, world_size: int) -> list[Partition]:
    """Flat tensors into which ZeRO's stages 1 to 3 cut the parameters, with all ranks' slices."""
    names = {id(weight): name for name, weight in engine.module.named_parameters()}
    zero, groups = engine.optimizer, engine.basic_optimizer.param_groups
    partitions = []
    if engine.zero_optimization_stage() == 3:
        for number, weights in enumerate(zero.fp16_groups):
            group = groups[zero.sub_group_to_group_id[number]]
            slices = slices_of_each(
                [weight.partition_numel() for weight in weights],
                [weight.ds_numel for weight in weights],
                world_size,
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
                world_size,
            )
            flat = zero.single_partition_of_fp32_groups[number]
            named = tuple(names[id(weight)] for weight in weights)
            partitions.append(Partition(flat, groups[number]["orthogonalize"], named, slices))
    return partitions


def holdings_of(engine: Any, rank: int, world_size: int) -> list[Holding]:
    """Tensors that this rank updates: all weights at stage 0, its slices at the others."""
    if engine.zero_optimization_stage():
        return [
            Holding(
                one.tensor,
                one.is_orthogonalized,
                tuple(zip(one.names, one.slices[rank], strict=True)),
            )
            for one in partitions_of(engine, world_size)
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
    optimizer = engine.basic_optimizer
    state: dict[str, Tensor] = {}
    holdings = holdings_of(engine, rank, world_size)
    if engine.zero_optimization_stage() == 0:  # every rank has everything
        holdings = holdings[rank::world_size]
    for holding in holdings:
        tensors = {WEIGHT: holding.tensor.detach()}
        tensors |= {
            kind: tensor
            for kind, tensor in optimizer.state.get(holding.tensor, {}).items()
            if kind in holding.kinds()
        }
        for kind, tensor in tensors.items():
            flat = tensor.reshape(-1)
            for name, run in holding.runs:
                if run.length:
                    view = flat[run.local_start : run.local_start + run.length]
                    state[f"{kind}:{name}:{run.matrix_start}"] = view
    return state


def num_updates(engine: Any) -> int:
    """Number of updates by AdamW, without skipped steps."""
    counts = [state["step"] for state in engine.basic_optimizer.state.values() if "step" in state]
    return int(max(counts, default=0))


class StateDiffersError(Exception):
    """Error for a checkpoint whose state differs from an engine's; `differing` lists how."""

    def __init__(self, differing: Sequence[str]) -> None:
        super().__init__("; ".join(differing))
        self.differing = differing


class SavedState:
    """Runs in the files of a checkpoint, of any world size."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Read the files' headers. Raises OSError, CheckpointCorruptError."""
        self._runs: dict[tuple[str, str], list[tuple[int, int, TensorFile, str]]] = {}
        open_files = OpenFiles()
        for path in files:
            file = TensorFile(path, open_files)
            for key, entry in file.entries.items():
                found = _RUN_KEY.fullmatch(key)
                if found is None or len(entry.shape) != 1:
                    raise CheckpointCorruptError(
                        f"{path} has {briefly(key)} of shape {list(entry.shape)}, which is not a "
                        "run of a parameter's elements; use another checkpoint"
                    )
                kind, name, start = found.groups()
                run = (int(start), entry.shape[0], file, key)
                self._runs.setdefault((kind, name), []).append(run)
        for runs in self._runs.values():
            runs.sort(key=lambda run: run[:2])

    def num_parameters(self) -> int:
        """Number of parameters that have weights."""
        return sum(kind == WEIGHT for kind, _ in self._runs)

    def differences(self, expected: Mapping[tuple[str, str], int]) -> list[str]:
        """Differences from the expected number of elements, by kind and parameter."""
        found = {key: self._num_elements(key) for key in self._runs}
        return [
            f"{kind} of {name} "
            + (
                "is missing"
                if (kind, name) not in found
                else "is unexpected"
                if (kind, name) not in expected
                else f"has {found[kind, name]:,} elements, not {expected[kind, name]:,}"
            )
            for kind, name in sorted(found.keys() | expected.keys())
            if found.get((kind, name)) != expected.get((kind, name))
        ]

    def _num_elements(self, key: tuple[str, str]) -> int:
        """Number of consecutive elements from 0, up to the first gap or overlap."""
        end = 0
        for start, length, *_ in self._runs[key]:
            if start != end:
                break
            end += length
        return end

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with a parameter's elements from `start` on. Raises KeyError if any lack."""
        stop, missing = start + len(out), len(out)
        for run_start, length, file, key in self._runs[kind, name]:
            first, last = max(start, run_start), min(stop, run_start + length)
            if first < last:
                file.read(key, first - run_start, out[first - start : last - start])
                missing -= last - first
        if missing:
            raise KeyError(f"{missing} elements of {kind}:{name}")


@torch.no_grad()
def restore(engine: Any, saved: SavedState, updates: int, rank: int, world_size: int) -> None:
    """Restore the saved state into an engine that has taken no step. Collective.

    Raises StateDiffersError, before anything is changed, unless the saved state has exactly the
    elements of the engine's.
    """
    optimizer = engine.basic_optimizer
    holdings = holdings_of(engine, rank, world_size)
    differing = saved.differences(_expected(engine, holdings, has_state=updates > 0))
    if differing:
        raise StateDiffersError(differing)
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
                    saved.read(kind, name, run.matrix_start, part)
    _refresh_copies(engine)


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


def _refresh_copies(engine: Any) -> None:
    """Update the model's weights from the fp32 slices."""
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


def _whole(weight: Tensor) -> Slice:
    return Slice(0, 0, weight.numel())
