"""Ranks that compare the gradients of an engine with exact sums; see test_gradients.py.

    python -m tests.helpers.gradient_worker WORLD_SIZE CONFIG CASES

CASES is a JSON list of lists of overrides. For each, one step of many micro-batches is taken, whose
gradients are also added in fp64. Prints a JSON line: the relative error of the gradient that the
optimizer gets, and of the norm that is logged.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.stage3  # noqa: F401 - imported once, before the ranks are forked
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loading.rows import Batch
from megaback.checkpoints.state import holdings_of, load_weights, refresh_copies
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.distributed.engine import start_engine, take_step
from megaback.distributed.gradients import count_micro_batch, reducing_gradients
from megaback.distributed.world import World, end_rank, start_world
from megaback.model.gpt import ReverseGPT
from megaback.model.mup import initial_weights
from megaback.training.validation import to_device
from tests.helpers.forked_ranks import run_forked

_CPU = torch.device("cpu")


def main(path: Path, cases: list[list[str]]) -> None:
    """Print the errors of every case."""
    world = start_world("cpu", 60)
    for overrides in cases:
        config = load_config(path, tuple(overrides))
        data = open_data(config, world.rank, world.size)
        micro_batches = data.training.at(0)
        (num_targets,) = world.sum(sum(batch.num_targets for batch in micro_batches))
        share = world.size * len(micro_batches) / num_targets
        model = ReverseGPT(config.model, data.codec.vocab_size)
        expected, shapes = summed(model), model.shapes()
        engine = start_engine(model, config, data.micro_batch_rows, data.accumulation_steps)
        weights = initial_weights(config.model, shapes, config.training.seed)
        load_weights(engine, weights)
        refresh_copies(engine)
        found, norm = gradients_of_step(engine, micro_batches, share, world)
        data.training.close()
        for total in expected.values():
            dist.all_reduce(total)
            total /= world.size
        errors = [0.0, 0.0]
        for (name, start), part in found.items():
            exact = expected[name].view(-1)[start : start + len(part)]
            errors[0] += float((part.double() - exact).square().sum())
            errors[1] += float(exact.square().sum())
        error, square = world.sum(*errors)
        true_norm = float(sum(exact.square().sum() for exact in expected.values())) ** 0.5
        if world.is_first:
            ratio = 1.0 if config.zero.stage else world.size  # there all ranks have everything
            assert abs(square / ratio / true_norm**2 - 1) < 1e-9
            line = [(error / square) ** 0.5, abs(norm / true_norm - 1)]
            print(json.dumps(line), flush=True)
    end_rank()


def summed(model: ReverseGPT) -> dict[str, Tensor]:
    """Sums in fp64 of all gradients that backward passes will compute, by parameter."""
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in model.shapes().items()}

    def add_to(total: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            total.add_(gradient)

        return add

    for name, weight in model.named_parameters():
        weight.register_hook(add_to(sums[name]))
    return sums


def gradients_of_step(
    engine: Any, micro_batches: list[Batch], share: float, world: World
) -> tuple[dict[tuple[str, int], Tensor], float]:
    """Take a step; returns the optimizer's gradients by name and start, and their norm."""
    found: dict[tuple[str, int], Tensor] = {}
    optimizer, holdings = engine.basic_optimizer, holdings_of(engine)
    usual = optimizer.step

    def step(closure: Any = None) -> Any:
        for holding in holdings:
            if holding.tensor.grad is not None:
                flat = holding.tensor.grad.detach().reshape(-1).clone()
                assert flat.dtype == torch.float32
                for name, run in holding.runs:
                    part = flat[run.local_start : run.local_start + run.length]
                    found[name, run.matrix_start] = part
        return usual(closure)

    optimizer.step = step
    engine.train()
    with reducing_gradients(engine):
        for batch in micro_batches:
            engine.backward(engine(*to_device(batch, _CPU)).sum() * share)
            if batch is not micro_batches[-1]:
                count_micro_batch(engine)
    norm, _ = take_step(engine, lambda _norm: None)
    return found, norm


if __name__ == "__main__":
    run_forked(int(sys.argv[1]), partial(main, Path(sys.argv[2]), json.loads(sys.argv[3])))
