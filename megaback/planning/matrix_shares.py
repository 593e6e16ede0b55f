"""Matrices of each rank under Muon: those that it orthogonalizes, and the slices that it holds.

Computed from the model's shape as `optim.zero_matrices` chooses owners from the slices of a run; a
test compares both. Loads no torch.
"""

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np

from megaback.config import ModelSection

MatrixShape = tuple[int, int]
"""Rows and columns."""
_ALIGNMENT = 2
"""Elements to whose multiple ZeRO 1 and 2 pad a rank's slice."""


@dataclass(frozen=True)
class MatrixShare:
    """Matrices of one rank, in elements."""

    held: int
    """Elements of all matrices in the rank's slice, which it updates."""
    owned: tuple[MatrixShape, ...]
    """Matrices that it orthogonalizes."""
    kept: int
    """Elements of these in its own slice, which are not sent."""

    @property
    def owned_elements(self) -> int:
        return sum(rows * columns for rows, columns in self.owned)

    @property
    def sent_elements(self) -> int:
        """Elements that it sends: its slices to their owners, and results of its own matrices."""
        return self.held - self.kept + self.owned_elements - self.kept


def matrices_of(shape: ModelSection) -> tuple[MatrixShape, ...]:
    """Shapes of the matrices of all blocks, in the model's order."""
    width, kv_width = shape.width, shape.kv_width
    query_width, mlp_width = shape.query_width, shape.hidden_mlp_width
    block = (
        (query_width, width),
        (kv_width, width),
        (kv_width, width),
        (width, query_width),
        (mlp_width, width),
        (mlp_width, width),
        (width, mlp_width),
    )
    return block * shape.num_layers


def matrix_shares(shape: ModelSection, ranks: int, stage: int) -> tuple[MatrixShare, ...]:
    """Shares of the ranks that own a matrix, at a ZeRO stage from 1 to 3, and of one that does not.

    The last is the first of those without a matrix, if there are any.
    """
    found = _shares(matrices_of(shape), ranks, stage == 3)
    without = next((rank for rank in range(ranks) if rank not in found), None)
    last = [] if without is None else [matrix_share(shape, ranks, stage, without)]
    return (*found.values(), *last)


def matrix_share(shape: ModelSection, ranks: int, stage: int, rank: int) -> MatrixShare:
    """The share of one rank, at a ZeRO stage from 1 to 3."""
    matrices, is_each = matrices_of(shape), stage == 3
    found = _shares(matrices, ranks, is_each).get(rank)
    return found or MatrixShare(_held(matrices, ranks, is_each, rank), (), 0)


@cache
def _shares(matrices: tuple[MatrixShape, ...], ranks: int, is_each: bool) -> dict[int, MatrixShare]:
    """Shares of the ranks that own a matrix. `is_each`: each matrix is cut into `ranks` slices."""
    owned: dict[int, list[int]] = {}
    for number, owner in enumerate(matrix_owners(matrices, ranks, is_each=is_each)):
        owned.setdefault(owner, []).append(number)
    lengths = _lengths(matrices)
    starts = np.cumsum([0, *lengths])
    partition = partition_elements(sum(lengths), ranks)

    def kept(rank: int, number: int) -> int:
        if is_each:
            return _held((matrices[number],), ranks, True, rank)
        first = max(int(starts[number]), rank * partition)
        return max(min(int(starts[number + 1]), (rank + 1) * partition) - first, 0)

    return {
        rank: MatrixShare(
            held=_held(matrices, ranks, is_each, rank),
            owned=tuple(matrices[number] for number in numbers),
            kept=sum(kept(rank, number) for number in numbers),
        )
        for rank, numbers in owned.items()
    }


def matrix_owners(matrices: tuple[MatrixShape, ...], ranks: int, *, is_each: bool) -> list[int]:
    """Rank that orthogonalizes each matrix: of those that hold most of it, the least loaded one."""
    work = [rows * columns * min(rows, columns) for rows, columns in matrices]
    lengths = _lengths(matrices)
    partition = partition_elements(sum(lengths), ranks)
    busy = np.zeros(ranks, dtype=np.int64)
    owners = [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda number: -work[number]):
        if is_each:
            first, stop = 0, max(lengths[number] // ceil(lengths[number] / ranks), 1)
        else:
            start = sum(lengths[:number])
            first, stop = _largest(start, start + lengths[number], partition)
        owner = first + int(np.argmin(busy[first:stop]))
        owners[number] = owner
        busy[owner] += work[number]
    return owners


def _largest(start: int, end: int, partition: int) -> tuple[int, int]:
    """Range of the ranks that hold most of the elements from `start` to `end` of a flat tensor."""
    first, last = start // partition, (end - 1) // partition
    held = {
        rank: min(end, (rank + 1) * partition) - max(start, rank * partition)
        for rank in {first, min(first + 1, last), max(first, last - 1), last}
    }
    largest = max(held.values())
    # Ranks between the first and the last hold whole partitions.
    low = first if held[first] == largest else min(first + 1, last)
    high = last if held[last] == largest else max(first, last - 1)
    return low, high + 1


def _held(matrices: tuple[MatrixShape, ...], ranks: int, is_each: bool, rank: int) -> int:
    """Elements in the slice of a rank."""
    lengths = _lengths(matrices)
    pieces = lengths if is_each else [sum(lengths)]
    held = 0
    for length in pieces:
        partition = ceil(length / ranks) if is_each else partition_elements(length, ranks)
        held += min(max(length - rank * partition, 0), partition)
    return held


def partition_elements(length: int, ranks: int) -> int:
    """Elements of a rank's slice of a flat tensor at ZeRO 1 and 2, padded."""
    return ceil(length / (ranks * _ALIGNMENT)) * _ALIGNMENT


def _lengths(matrices: tuple[MatrixShape, ...]) -> list[int]:
    return [rows * columns for rows, columns in matrices]
