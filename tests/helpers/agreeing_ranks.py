"""Three ranks that agree on numbers, errors and batches; see test_between_ranks.py.

python -m tests.helpers.agreeing_ranks
"""

from collections.abc import Callable, Iterator

import deepspeed  # noqa: F401 - imported once, before the ranks are forked
import numpy as np

from data_pipeline.errors import BatchError, MegabackError, ShardCorruptError
from data_pipeline.loading.rows import Batch
from megaback.distributed.world import CollectiveExit, World, end_rank, start_world
from megaback.training.validation import agreed_batches
from tests.helpers.forked_ranks import run_forked

EMPTY = Batch(
    ids_T=np.zeros(0, np.int64),
    targets_T=np.zeros(0, np.int64),
    cu_seqlens=np.zeros(1, np.int32),
    num_targets=0,
    num_skipped_rows=0,
)


def main() -> None:
    """Check what each rank gets."""
    world = start_world("cpu", 60)
    later = world.begin_max(world.rank, -world.rank)
    assert world.sum(world.rank, 1) == [3, 3]
    assert later.result() == later.result() == [2, 0]

    errors = {1: BatchError("of rank 1"), 2: MegabackError("of rank 2")}
    world.stop_if_any(None)
    assert exit_of(lambda: world.stop_if_any(errors.get(world.rank)), world) == (
        BatchError.exit_code,
        1,
    )
    used: list[Batch] = []
    assert exit_of(lambda: used.extend(agreed_batches(batches(world), world)), world) == (
        ShardCorruptError.exit_code,
        2,
    )
    assert used == [EMPTY]
    assert len(list(agreed_batches(iter([EMPTY] * 3), world))) == 3
    end_rank()


def exit_of(action: Callable[[], None], world: World) -> tuple[int, int]:
    """Exit code with which an action ends every rank, and the rank that reports the error."""
    try:
        action()
    except CollectiveExit as ending:
        speakers = world.gather(ending.error is not None, bool)
        assert speakers.count(True) == 1
        return int(ending.code or 0), speakers.index(True)
    raise AssertionError("nothing has ended")


def batches(world: World) -> Iterator[Batch]:
    """Three batches, of which the last rank cannot read the second."""
    yield EMPTY
    if world.rank == world.size - 1:
        raise ShardCorruptError("a damaged frame")
    yield EMPTY
    yield EMPTY


if __name__ == "__main__":
    run_forked(3, main)
