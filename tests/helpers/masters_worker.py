"""Ranks that compare their fp32 weights with the initial ones; see test_fp32_weights.py.

    python -m tests.helpers.masters_worker WORLD_SIZE CONFIG FOLDER BASE

In bf16 at every sharded ZeRO stage, AdamW begins with the weights of the seed, and Muon with those
of BASE, a model folder in fp32. Each rank's part of them must be bitwise the same.
"""

import sys
from functools import partial
from itertools import product
from pathlib import Path

import deepspeed.runtime.zero.stage3  # noqa: F401 - imported once, before the ranks are forked
import torch
import torch._dynamo
from torch import Tensor

from megaback.checkpoints.state import named_state
from megaback.config import Config
from megaback.config_file import load_config
from megaback.distributed.world import World, end_rank, start_world
from megaback.faults.watchdog import Watchdog
from megaback.model.mup import initial_weights
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.weights.source import open_source
from megaback.weights.weight_names import shapes_of
from tests.helpers.forked_ranks import run_forked


def main(path: Path, folder: Path, base: Path) -> None:
    """Prepare every run, and compare."""
    world = start_world("cpu", 60)
    for stage, (optimizer, init_from) in product((1, 2, 3), (("adamw", None), ("muon", base))):
        overrides = [f"zero.stage={stage}", f"optimizer.name={optimizer}"]
        overrides += [] if init_from is None else [f"init_from={init_from}"]
        run = folder / f"{stage}-{optimizer}"
        config = load_config(path, (*overrides, f"run={run}", "training.precision=bf16"))
        compare(config, world)
    end_rank()


def compare(config: Config, world: World) -> None:
    """Set up a run, and compare its weights with those that it begins with."""
    run = prepare_run(config, world, Watchdog(config.run, config.hardware, world))
    assert isinstance(run, Run)
    shapes = shapes_of(config.model, run.data.codec.vocab_size)
    if config.init_from is not None:
        base = open_source(config.init_from)
        expected = {name: base.read(name) for name in shapes}
    else:
        expected = dict(initial_weights(config.model, shapes, config.training.seed))
    state = named_state(run.engine, world.rank, world.size)
    for key, part in state.items():
        _, name, start = key.split(":")
        whole = expected[name].view(-1)
        assert part.dtype == torch.float32
        assert torch.equal(part, whole[int(start) : int(start) + len(part)]), key
    (num_elements,) = world.sum(sum(part.numel() for part in state.values()))
    assert num_elements == sum(whole.numel() for whole in expected.values())
    assert any(is_rounded(whole) for whole in expected.values())
    if config.zero.stage < 3:
        for name, weight in run.engine.module.named_parameters():
            assert torch.equal(weight, expected[name].to(torch.bfloat16)), name
    run.data.training.close()


def is_rounded(whole: Tensor) -> bool:
    """Whether a weight changes in bf16."""
    return not torch.equal(whole.to(torch.bfloat16).float(), whole)


if __name__ == "__main__":
    run_forked(int(sys.argv[1]), partial(main, *map(Path, sys.argv[2:])))
