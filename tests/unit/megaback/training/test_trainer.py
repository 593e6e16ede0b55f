"""Training loop on one rank: steps, skipped steps, signals and early stopping."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from data_pipeline.errors import PreemptedError, UserInterruptError
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.config import Config
from megaback.distributed.world import World
from megaback.faults.step_guard import write_skipped_steps
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.run_folder import complete_checkpoints
from megaback.tracking.metrics import read_metrics
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.training.trainer import Trainer

Configs = Callable[..., Config]


class InterruptedAtOnce(StopRequest):
    """Stop request that receives Ctrl-C just before the first step."""

    def begin_training(self) -> None:
        super().begin_training()
        os.kill(os.getpid(), signal.SIGINT)


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


def interrupt(config: Config, world: World) -> None:
    """Start a run and end it by Ctrl-C before its first step."""
    with (
        trainer_of(config, world, InterruptedAtOnce()) as (trainer, _),
        pytest.raises(UserInterruptError, match="before the first step"),
    ):
        trainer.train()


def lines_of(config: Config, field: str) -> dict[int, Any]:
    """A field of metrics.jsonl, by step."""
    return {line["step"]: line[field] for line in read_metrics(config.run) if field in line}


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


def test_a_run_is_trained_validated_and_saved_to_its_end(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()

    assert train(config, training_world) == "trained to the end"

    losses = lines_of(config, "loss")
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[1]
    assert list(lines_of(config, "val_loss")) == [0, 4]
    assert [path.name for path in complete_checkpoints(config.run)] == [
        "step-00000002",
        "step-00000004",
    ]
    assert find_checkpoint(config.run)[1].val_loss == lines_of(config, "val_loss")[4]


def test_a_signal_saves_the_step_and_the_next_start_continues(
    config_of: Configs, training_world: World
) -> None:
    config, whole = config_of(), config_of("whole")
    train(whole, training_world)
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 2 * 2 + 1, signal_itself(signal.SIGTERM))  # 2 micro-batches per step
        with pytest.raises(PreemptedError, match="asked to stop after 3 steps, all of them saved"):
            trainer.train()
    assert find_checkpoint(config.run)[1].step == 3

    train(config, training_world)

    assert lines_of(config, "loss") == lines_of(whole, "loss")


def test_ctrl_c_before_the_first_step_saves_nothing(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()

    interrupt(config, training_world)

    assert complete_checkpoints(config.run) == []


def test_a_step_with_a_non_finite_loss_changes_no_weights(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 3, lambda output: output * torch.nan)
        trainer.train()

    assert list(lines_of(config, "skipped")) == [2]
    meta = find_checkpoint(config.run)[1]
    assert (meta.step, meta.updates) == (4, 3)


def test_steps_excluded_by_a_rollback_are_skipped(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()
    interrupt(config, training_world)
    write_skipped_steps(config.run, b"[[2, 3]]")

    train(config, training_world)

    assert list(lines_of(config, "loss")) == [1, 4]
    assert list(lines_of(config, "excluded")) == [2, 3]
    meta = find_checkpoint(config.run)[1]
    assert (meta.step, meta.updates) == (4, 2)


def test_a_run_whose_val_loss_no_longer_falls_stops_early(
    config_of: Configs, training_world: World
) -> None:
    config = config_of(
        optimizer={"learning_rate": 0.3},  # so high that each validation is worse
        training={"steps": 20, "precision": "fp32"},
        validation={"every_steps": 1, "patience": 2},
    )

    assert train(config, training_world).startswith("stopped early: val loss did not fall below")

    val_losses, last = lines_of(config, "val_loss"), max(lines_of(config, "loss"))
    assert last == min(val_losses, key=val_losses.__getitem__) + 2 < 20
