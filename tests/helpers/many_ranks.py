"""More ranks than matrices, and than a low limit of open files allows; see test_many_ranks.py.

python -m tests.helpers.many_ranks WORLD_SIZE FOLDER
"""

import shutil
import sys
from functools import partial
from pathlib import Path

import deepspeed  # noqa: F401 - imported once, before the ranks are forked
import torch
from torch import Tensor

from megaback.checkpoints.checkpoint import CheckpointMeta, newest_checkpoint
from megaback.checkpoints.fetching import fetch_newest
from megaback.checkpoints.remote_copy import CheckpointCopier, CopyTarget
from megaback.checkpoints.saver import CheckpointSaver
from megaback.config_operation import CheckpointSection
from megaback.distributed.world import World, end_rank, start_world
from megaback.optim.muon import orthogonalized
from megaback.optim.zero_matrices import MatrixShards, Slice, slices_of_each, slices_of_flat
from tests.helpers.forked_ranks import run_forked

SHAPES = [(4, 6), (5, 3)]


def main(folder: Path) -> None:
    """Update two matrices on all ranks, as ZeRO 1 and 3 cut them, and share out a checkpoint."""
    world = start_world("cpu", 60)
    assert world.gather(world.rank, int) == list(range(world.size))
    share_out_a_checkpoint(folder, world)
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


def share_out_a_checkpoint(folder: Path, world: World) -> None:
    """Check that each rank hashes its part of a checkpoint's files, and all agree on the result."""
    opened: list[str] = []

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".safetensors"):
            opened.append(str(arguments[0]))

    run, section = folder / "run", CheckpointSection(copy_to=str(folder / "copies"))
    saver, meta = CheckpointSaver(run, b"tokenizer", section, world), meta_of(world)
    state = {f"weight:a:{world.rank}": torch.full((1,), float(world.rank))}
    saver.begin(state, meta)
    saver.finish()
    copier = CheckpointCopier(run, section, world)
    copier.begin(target := saver.take_completed())
    copier.finish(print)
    assert target is not None
    sys.addaudithook(count)
    most_files = -(-(2 * world.size + 1) // world.size)  # two of each rank, and the tokenizer

    saver.begin(state, meta)  # it is saved already
    assert saver.is_open is False
    assert len(opened) <= most_files
    if world.is_first:
        shutil.rmtree(run)
    world.barrier()
    opened.clear()
    found = fetch_newest(run, CopyTarget(str(folder / "copies"), run), world)
    assert found is not None
    assert found[0] == target
    assert len(opened) <= 3 * most_files  # read, written, and hashed
    assert newest_checkpoint(run, world) == found
    if world.rank == world.size - 1:
        (target / f"weights-{world.rank // 2:05d}.safetensors").write_bytes(b"damaged")
    world.barrier()
    saver.begin(state, meta)
    assert saver.is_open is True  # on every rank: it is saved again
    saver.finish()
    found = newest_checkpoint(run, world)
    assert found is not None
    assert found[0] == target


def meta_of(world: World) -> CheckpointMeta:
    return CheckpointMeta(
        step=1,
        updates=1,
        world_size=world.size,
        zero_stage=1,
        precision="fp32",
        vocab_size=1,
        text_format={"direction": "backward", "unit": "token", "tokenizer_sha256": "ab" * 32},
        data_fingerprint="",
        config={},
        val_loss=None,
        versions={},
        files={},
    )


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
    run_forked(int(sys.argv[1]), partial(main, Path(sys.argv[2])))
