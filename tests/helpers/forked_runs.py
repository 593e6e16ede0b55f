"""Ranks of several nodes, on one machine, that train one run after another.

    python -m tests.helpers.forked_runs WORLD_SIZE RANKS_PER_NODE CONFIG JOBS

JOBS is a JSON list of [WORLD_SIZE, lists of overrides], each list one run, trained to its end.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import deepspeed.runtime.zero.stage3  # noqa: F401 - imported once, before the ranks are forked
import torch._dynamo  # noqa: F401

from megaback.distributed.world import end_rank, start_world
from tests.helpers.forked_ranks import run_forked
from tests.helpers.warm_rank import train


def main(config: str, ranks_per_node: int, runs: list[list[str]]) -> None:
    """Train the runs."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_SIZE"] = str(ranks_per_node)
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_node)
    os.environ["MEGABACK_HOST"] = f"node{rank // ranks_per_node}"
    world = start_world("cpu", 60)
    for overrides in runs:
        output = f"{config}.{rank}.txt"
        problem = train(world, config, overrides, output, str(Path.cwd()))
        if problem is not None:
            raise SystemExit(f"rank {rank}, {' '.join(overrides)}: {problem}")
    end_rank()


if __name__ == "__main__":
    config, jobs = sys.argv[1], json.loads(sys.argv[2])
    for world_size, ranks_per_node, runs in jobs:
        run_forked(world_size, partial(main, config, ranks_per_node, runs))
