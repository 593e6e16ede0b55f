"""Messages that travel while a step computes: when they are started, and what they decide."""

import signal
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import PreemptedError, ShardCorruptError
from data_pipeline.loading.loader import TrainingLoader
from data_pipeline.loading.rows import Batch
from megaback.checkpoints import saver
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.config import Config
from megaback.distributed.world import CollectiveExit, World
from megaback.tracking.metrics import read_metrics
from tests.helpers.training import at_forward, signal_itself, train, trainer_of

Configs = Callable[..., Config]


@pytest.mark.parametrize("rank_times", [False, True])
def test_a_step_waits_for_no_message_before_its_update(
    config_of: Configs,
    training_world: World,
    monkeypatch: pytest.MonkeyPatch,
    rank_times: bool,
) -> None:
    """A step's all-reduces of numbers are started before it needs them, and are small."""
    config = config_of(checkpoint={}, logging={"tensorboard": "off", "rank_times": rank_times})
    num_maxima = 4 if rank_times else 2
    started: list[tuple[str, bool, int]] = []
    phase = "start"
    all_reduce = dist.all_reduce

    def noting(
        tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if tensor.dtype == torch.float64:
            started.append((phase, async_op, tensor.numel()))
        return all_reduce(tensor, op, group, async_op)

    def note(module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal phase

        def enter_backward(_gradient: Tensor) -> None:
            nonlocal phase
            phase = "backward"

        if module.training:
            phase = "forward"
            output.register_hook(enter_backward)

    with trainer_of(config, training_world) as (trainer, run):
        run.engine.module.register_forward_hook(note)
        monkeypatch.setattr(dist, "all_reduce", noting)
        trainer.train()

    # The first step's maxima are found after its gradients. Each step has two backward passes.
    of_steps = [one for one in started if one[0] != "start"][:8]
    assert of_steps == [
        ("forward", True, 9),
        ("backward", True, num_maxima),
        *[("backward", True, num_maxima), ("forward", True, 9)] * 3,
    ]


def test_a_signal_in_the_last_backward_pass_stops_a_step_later(
    config_of: Configs, training_world: World
) -> None:
    config, whole = config_of(), config_of("whole")
    train(whole, training_world)
    with trainer_of(config, training_world) as (trainer, run):
        send = signal_itself(signal.SIGTERM)
        at_forward(run, 2 * 2, lambda output: output.register_hook(send) and None)
        with pytest.raises(PreemptedError, match="asked to stop after 3 steps"):
            trainer.train()
    assert find_checkpoint(config.run)[1].step == 3

    train(config, training_world)

    assert losses_of(config) == losses_of(whole)


def fail_at(step: int) -> Callable[[TrainingLoader, int], list[Batch]]:
    """A loader that cannot read the rows of a step."""
    read = TrainingLoader.at

    def at(self: TrainingLoader, asked: int) -> list[Batch]:
        if asked == step:
            raise ShardCorruptError("a damaged frame")
        return read(self, asked)

    return at


def test_the_step_before_unreadable_rows_is_trained_and_saved(
    config_of: Configs, training_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(checkpoint={})
    monkeypatch.setattr(TrainingLoader, "at", fail_at(2))
    with trainer_of(config, training_world) as (trainer, _), pytest.raises(CollectiveExit) as found:
        trainer.train()
    assert found.value.code == ShardCorruptError.exit_code
    assert find_checkpoint(config.run)[1].step == 2
    assert len(losses_of(config)) == 2


def test_unreadable_rows_after_the_last_step_change_nothing(
    config_of: Configs, training_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingLoader, "at", fail_at(4))
    assert train(config_of(), training_world) == "trained to the end"


def test_training_does_not_wait_for_a_checkpoint_begun_after_the_messages(
    config_of: Configs, training_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 2 is written once step 4 computes."""
    step_4_computes = Event()
    waited: list[bool] = []
    write = saver.write_tensors

    def write_later(*arguments: Any) -> Any:
        waited.append(step_4_computes.wait(20))
        return write(*arguments)

    monkeypatch.setattr(saver, "write_tensors", write_later)
    with trainer_of(config_of(), training_world) as (trainer, run):
        at_forward(run, 2 * 3 + 1, lambda _output: step_4_computes.set())
        trainer.train()
    assert waited
    assert all(waited)


def losses_of(config: Config) -> list[float]:
    return [line["loss"] for line in read_metrics(config.run) if "loss" in line]
