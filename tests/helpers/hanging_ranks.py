"""Two ranks over gloo, of which the second enters no more collectives; both write records.

python -m tests.helpers.hanging_ranks FOLDER
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megaback.distributed.world import World
from megaback.faults.collective_record import write_collectives
from megaback.faults.flight_recorder import dump_collectives
from megaback.run_folder import collectives_path
from tests.helpers.forked_ranks import run_forked


def main() -> None:
    """Enter a collective on the first rank only."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo", group_desc="control messages")
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), group)
    world.sum(1, 2, 3)
    if world.is_first:
        world.begin_sum(1.0, 2.0)
    oversleep(world)


def oversleep(world: World) -> None:
    write(world)
    while not collectives_path(Path(sys.argv[1]), 1 - world.rank).exists():
        time.sleep(0.01)


def write(world: World) -> None:
    dumped = dump_collectives(rank=world.rank, world_size=world.size, start="0" * 12)
    assert dumped is not None
    write_collectives(Path(sys.argv[1]), *dumped)


if __name__ == "__main__":
    run_forked(2, main)
