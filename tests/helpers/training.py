"""A run's training loop in the test's own process."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megaback.config import Config
from megaback.distributed.world import World
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.training.trainer import Trainer


@contextmanager
def trainer_of(
    config: Config, world: World, stop: StopRequest | None = None
) -> Iterator[tuple[Trainer, Run]]:
    """A trainer at the newest checkpoint, and its run."""
    watchdog = Watchdog(config.run, config.hardware, world)
    run = prepare_run(config, world, watchdog)
    assert isinstance(run, Run)
    trainer = Trainer(run, world, stop or StopRequest())
    try:
        yield trainer, run
    finally:
        trainer.close()
        watchdog.mark_exited("the test is over")


def train(config: Config, world: World) -> str:
    with trainer_of(config, world) as (trainer, _):
        return trainer.train()


def at_forward(run: Run, number: int, action: Callable[[Any], Any]) -> None:
    """Call `action` with the output of one training forward pass, counted from 1."""
    calls = 0

    def hook(module: torch.nn.Module, _inputs: object, output: Any) -> Any:
        nonlocal calls
        calls += module.training
        return action(output) if module.training and calls == number else None

    run.engine.module.register_forward_hook(hook)


def signal_itself(number: signal.Signals) -> Callable[[Any], None]:
    return lambda _output: os.kill(os.getpid(), number)
