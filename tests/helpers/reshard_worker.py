"""Ranks that save or load checkpoints at every ZeRO stage; see test_resharding.py.

    python -m tests.helpers.reshard_worker JOBS

JOBS is a JSON list of [config, world size, "save" or "load", pairs, names]: pairs of (saved stage,
resumed stage), and names ANYTHING-OPTIMIZER or ANYTHING-OPTIMIZER-OFFLOAD. `save` trains three
steps at each stage and saves as NAME/stage-N beside the config; `load` resumes from them at other
stages. Both then train three more steps and print the losses, one JSON line per pair: name, stages,
losses.
"""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.stage3  # noqa: F401 - imported once, before the ranks are forked
import pytest
import torch
import torch._dynamo

from data_pipeline.errors import CheckpointCorruptError, RunMismatchError
from megaback.checkpoints.checkpoint import CheckpointMeta, load_into_engine, read_meta
from megaback.checkpoints.saver import CheckpointSaver
from megaback.checkpoints.state import named_state, num_updates, saved_index
from megaback.config import Config
from megaback.config_file import load_config
from megaback.config_operation import CheckpointSection
from megaback.data import open_data
from megaback.distributed.engine import set_learning_rates, start_engine, take_step
from megaback.distributed.world import CollectiveExit, World, end_rank, start_world
from megaback.model.gpt import ReverseGPT
from megaback.training.validation import to_device
from tests.helpers.forked_ranks import run_forked

STEPS = 3


def main(path: Path, action: str, pairs: list[list[int]], names: list[str]) -> None:
    """Save or load for each optimizer and pair of stages."""
    world = start_world("cpu", 60)
    for name in names:
        _, optimizer, offload = (*name.split("-"), "none")[:3]
        for saved_stage, stage in pairs:
            overrides = (f"zero.stage={stage}", f"zero.offload={offload}")
            config = load_config(path, (*overrides, f"optimizer.name={optimizer}"))
            engine = new_engine(config, world)
            run = path.parent / name / f"stage-{saved_stage}"
            if action == "save":
                train(engine, config, world, 0)
                save(engine, run, config, world)
            else:
                target = run / "checkpoints" / f"step-{STEPS:08d}"
                if saved_stage == stage:
                    if stage and world.size == read_meta(target).world_size == 2:
                        refuse_an_index_that_one_rank_finds_wrong(config, target, world)
                    if world.size <= 2:
                        refuse_another_optimizer(path, target, optimizer, stage, world)
                load_into_engine(engine, target, read_meta(target), world)
            report(world, name, saved_stage, stage, train(engine, config, world, STEPS))
    end_rank()


def refuse_another_optimizer(
    path: Path, target: Path, optimizer: str, stage: int, world: World
) -> None:
    """Check that loading fails on state of another optimizer, even without comparing configs."""
    other, lacking = {"adamw": ("muon", "momentum"), "muon": ("adamw", "exp_avg")}[optimizer]
    config = load_config(path, (f"zero.stage={stage}", f"optimizer.name={other}"))
    engine = new_engine(config, world)
    before = {
        key: part.clone() for key, part in named_state(engine, world.rank, world.size).items()
    }
    with pytest.raises(CollectiveExit) as ending:
        load_into_engine(engine, target, read_meta(target), world)
    assert ending.value.code == RunMismatchError.exit_code
    if world.is_first:
        assert re.search(f"{lacking}.* of .* is missing|is unexpected", str(ending.value.error))
    after = named_state(engine, world.rank, world.size)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def refuse_an_index_that_one_rank_finds_wrong(config: Config, target: Path, world: World) -> None:
    """Check that all ranks end if one of them cannot read its part."""
    meta = read_meta(target)
    runs = {
        key: [
            (0, 1, start + number * length, length)
            for _, num_ranks, start, length in of_key
            for number in range(num_ranks)
        ]
        for key, of_key in (meta.runs or {}).items()
    }
    with pytest.raises(CollectiveExit) as ending:
        load_into_engine(new_engine(config, world), target, replace(meta, runs=runs), world)
    assert ending.value.code == CheckpointCorruptError.exit_code


def new_engine(config: Config, world: World) -> Any:
    """An engine with meaningless weights."""
    data = open_data(config, world.rank, world.size)
    model = ReverseGPT(config.model, data.codec.vocab_size)
    model.initialize(7)
    return start_engine(model, config, data.micro_batch_rows, data.accumulation_steps)


def train(engine: Any, config: Config, world: World, first: int) -> list[float]:
    """Train three steps. Returns the loss of each, over all ranks."""
    data = open_data(config, world.rank, world.size)
    engine.train()
    losses = []
    for step in range(first, first + STEPS):
        micro_batches = data.training.at(step)
        (targets,) = world.sum(sum(batch.num_targets for batch in micro_batches))
        nats = 0.0
        for batch in micro_batches:
            loss = engine(*to_device(batch, torch.device("cpu"))).sum()
            engine.backward(loss * (world.size * len(micro_batches) / targets))
            nats += float(loss)
            if batch is not micro_batches[-1]:
                engine.step()
        set_learning_rates(engine, 1.0)
        take_step(engine, lambda _norm: None)
        losses.append(world.sum(nats)[0] / targets)
    return losses


def save(engine: Any, run: Path, config: Config, world: World) -> None:
    """Save a checkpoint of step 3."""
    saver = CheckpointSaver(run, b"tokenizer", CheckpointSection(), world)
    meta = CheckpointMeta(
        step=STEPS,
        updates=num_updates(engine),
        world_size=world.size,
        zero_stage=config.zero.stage,
        precision="fp32",
        vocab_size=1,
        text_format={"direction": "backward", "unit": "token", "tokenizer_sha256": "ab" * 32},
        data_fingerprint="",
        config={},
        val_loss=None,
        versions={},
        files={},
        runs=saved_index(engine, world.size),
    )
    saver.begin(named_state(engine, world.rank, world.size), meta)
    saver.finish()


def report(world: World, name: str, saved_stage: int, stage: int, losses: list[float]) -> None:
    """Print the JSON line of a pair, on the first rank."""
    if world.is_first:
        print(json.dumps([name, saved_stage, stage, losses]), flush=True)


if __name__ == "__main__":
    for config_path, size, *job in json.loads(sys.argv[1]):
        run_forked(size, partial(main, Path(config_path), *job))
