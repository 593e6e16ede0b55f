"""Whole matrices gathered from ZeRO's flat slices, and scattered back.

An optimizer under ZeRO has flat slices, and Muon needs matrices. Each matrix is gathered on one of
the ranks that hold most of it and updated there, and its slices are sent back: every rank sends and
receives its share of the weights twice, and never holds more. The result does not depend on the
number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive elements of a matrix in a rank's flat slice."""

    local_start: int
    matrix_start: int
    length: int


MatrixWork = Callable[[Sequence[Tensor]], list[Tensor]]


class MatrixShards:
    """The matrices of one flat slice: `slices[rank][matrix]`, in the same order on every rank."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        slices: Sequence[Sequence[Slice]],
        rank: int,
        device: torch.device,
        group: Any = None,
    ) -> None:
        """`device`: where matrices are gathered, the device of the collectives.

        `group`: process group of the ranks with slices; all ranks by default.
        """
        self._shapes = list(shapes)
        self._slices = slices
        self._rank = rank
        self._device = device
        self._group = group
        owners = choose_owners(self._shapes, slices)
        ranks = range(len(slices))
        mine = _of(owners, rank)
        # (other rank, matrix), in the order in which slices are sent in both directions. Most ranks
        # of many hold nothing of a matrix.
        self._lent = [
            (owner, number)
            for owner in ranks
            for number in _of(owners, owner)
            if slices[rank][number].length
        ]
        self._owned = [
            (other, number) for other in ranks for number in mine if slices[other][number].length
        ]

    def apply(self, work: MatrixWork, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """Apply `work` to whole matrices in `dtype`; returns this rank's slice of the results.

        Collective: every rank calls it with its own slice. The result has the shape of `flat`, with
        0 outside of matrices.
        """
        mine = [self._slices[self._rank][number] for _, number in self._lent]
        theirs = [self._slices[other][number] for other, number in self._owned]
        lent = [_run(flat, one.local_start, one.length) for one in mine]
        sent = [part.to(self._device, dtype) for part in lent]
        arrived = self._exchange(sent, self._lent, self._owned, theirs, dtype)
        whole = {
            number: torch.empty(self._shapes[number], dtype=dtype, device=self._device)
            for _, number in self._owned
        }
        for (_, number), one, part in zip(self._owned, theirs, arrived, strict=True):
            _run(whole[number].view(-1), one.matrix_start, one.length).copy_(part)
        results = dict(zip(whole, work(list(whole.values())), strict=True))
        flat_results = {number: result.reshape(-1) for number, result in results.items()}
        back = [
            _run(flat_results[number], one.matrix_start, one.length)
            for (_, number), one in zip(self._owned, theirs, strict=True)
        ]
        returned = self._exchange(back, self._owned, self._lent, mine, dtype)
        updates = torch.zeros_like(flat)
        for one, part in zip(mine, returned, strict=True):
            _run(updates, one.local_start, one.length).copy_(part)
        return updates

    def _exchange(
        self,
        parts: list[Tensor],
        destinations: Sequence[tuple[int, int]],
        sources: Sequence[tuple[int, int]],
        incoming: Sequence[Slice],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """Send each part to its rank; returns the received parts in the order of `sources`."""
        world_size = len(self._slices)
        if world_size == 1:
            return parts
        counts_out, counts_in = [0] * world_size, [0] * world_size
        for (rank, _), part in zip(destinations, parts, strict=True):
            counts_out[rank] += len(part)
        for (rank, _), one in zip(sources, incoming, strict=True):
            counts_in[rank] += one.length
        # A rank that owns no matrix has no parts to return.
        sent = torch.cat([torch.empty(0, dtype=dtype, device=self._device), *parts])
        arrived = sent.new_empty(sum(counts_in))
        dist.all_to_all_single(arrived, sent, counts_in, counts_out, group=self._group)
        return list(torch.split(arrived, [one.length for one in incoming]))


def choose_owners(
    shapes: Sequence[tuple[int, int]], slices: Sequence[Sequence[Slice]]
) -> list[int]:
    """Rank that gathers each matrix: of those that hold most of it, the least loaded one."""
    work = [rows * columns * min(rows, columns) for rows, columns in shapes]
    busy = [0] * len(slices)
    owners = [0] * len(shapes)
    for number in sorted(range(len(shapes)), key=lambda number: -work[number]):
        held = [of_rank[number].length for of_rank in slices]
        max_length = max(held)
        candidates = [rank for rank, length in enumerate(held) if length == max_length]
        owners[number] = min(candidates, key=busy.__getitem__)
        busy[owners[number]] += work[number]
    return owners


def slices_of_flat(
    starts: Sequence[int], lengths: Sequence[int], partition: int, world_size: int
) -> list[list[Slice]]:
    """Slices of concatenated matrices that are cut into equal partitions, one per rank."""

    def slice_of(rank: int, start: int, length: int) -> Slice:
        first = min(max(start, rank * partition), start + length)
        stop = max(min(start + length, (rank + 1) * partition), first)
        return Slice(max(first - rank * partition, 0), first - start, stop - first)

    return [
        [slice_of(rank, start, length) for start, length in zip(starts, lengths, strict=True)]
        for rank in range(world_size)
    ]


def slices_of_each(
    partitions: Sequence[int], lengths: Sequence[int], world_size: int
) -> list[list[Slice]]:
    """Slices of matrices that are each cut into one partition per rank, the last ones padded."""
    starts = [sum(partitions[:number]) for number in range(len(partitions))]

    def slice_of(rank: int, local_start: int, partition: int, length: int) -> Slice:
        first = min(rank * partition, length)
        return Slice(local_start, first, min(partition, length - first))

    return [
        [slice_of(rank, *one) for one in zip(starts, partitions, lengths, strict=True)]
        for rank in range(world_size)
    ]


def _of(owners: Sequence[int], rank: int) -> list[int]:
    return [number for number, owner in enumerate(owners) if owner == rank]


def _run(flat: Tensor, start: int, length: int) -> Tensor:
    return flat[start : start + length]
