"""More ranks than matrices, and than a low limit of open files allows; see test_many_ranks.py.

python -m tests.helpers.many_ranks WORLD_SIZE
"""

import sys

import deepspeed  # noqa: F401 - imported once, before the ranks are forked
import torch
from torch import Tensor

from megaback.distributed.world import World, end_rank, start_world
from megaback.optim.muon import orthogonalized
from megaback.optim.zero_matrices import MatrixShards, Slice, slices_of_each, slices_of_flat
from tests.helpers.forked_ranks import run_forked

SHAPES = [(4, 6), (5, 3)]


def main() -> None:
    """Update two matrices on all ranks, as ZeRO 1 and 3 cut them."""
    world = start_world("cpu", 60)
    assert world.gather(world.rank, int) == list(range(world.size))
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    lengths = [matrix.numel() for matrix in matrices]
    starts = [0, lengths[0]]
    partitions = [-(-length // world.size) for length in lengths]
    for slices in (
        slices_of_flat(starts, lengths, -(-sum(lengths) // world.size), world.size),
        slices_of_each(partitions, lengths, world.size),
    ):
        check_slices(
            MatrixShards(SHAPES, slices, world.rank, world.device), slices, matrices, world
        )
    end_rank()


def check_slices(
    shards: MatrixShards, slices: list[list[Slice]], matrices: list[Tensor], world: World
) -> None:
    """Check that this rank's slice of the updates is that of whole matrices."""
    expected = [update.flatten() for update in orthogonalized(matrices)]
    flat = torch.zeros(sum(one.numel() for one in matrices))
    for matrix, one in zip(matrices, slices[world.rank], strict=True):
        part = matrix.flatten()[one.matrix_start : one.matrix_start + one.length]
        flat[one.local_start : one.local_start + one.length] = part
    updates = shards.apply(orthogonalized, flat, torch.float32)
    for whole, one in zip(expected, slices[world.rank], strict=True):
        torch.testing.assert_close(
            updates[one.local_start : one.local_start + one.length],
            whole[one.matrix_start : one.matrix_start + one.length],
        )


if __name__ == "__main__":
    run_forked(int(sys.argv[1]), main)
