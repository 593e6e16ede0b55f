"""Training loop on one rank: steps, skipped steps, signals and early stopping."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from data_pipeline.errors import NonFiniteError, PreemptedError, UserInterruptError
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.config import Config
from megaback.distributed.world import CollectiveExit, World
from megaback.faults.step_guard import write_skipped_steps
from megaback.faults.stop_request import StopRequest
from megaback.run_folder import complete_checkpoints
from megaback.tracking.metrics import read_metrics
from megaback.tracking.samples_log import read_samples
from tests.helpers.training import at_forward, signal_itself, train, trainer_of

Configs = Callable[..., Config]


class InterruptedAtOnce(StopRequest):
    """Stop request that receives Ctrl-C just before the first step."""

    def begin_training(self) -> None:
        super().begin_training()
        os.kill(os.getpid(), signal.SIGINT)


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


def test_a_run_that_skipped_every_step_has_learned_nothing(
    config_of: Configs, training_world: World
) -> None:
    config = config_of(training={"steps": 1})
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 1, lambda output: output * torch.nan)
        with pytest.raises(NonFiniteError, match=r"all steps \(1\) were skipped, so nothing was"):
            trainer.train()

    assert find_checkpoint(config.run)[1].updates == 0


def test_a_branch_that_skipped_every_step_has_learned_nothing(
    config_of: Configs, training_world: World
) -> None:
    trunk = config_of("trunk", training={"steps": 1})
    train(trunk, training_world)
    config = config_of(training={"steps": 2}, branch_from=trunk.run)
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 1, lambda output: output * torch.nan)
        with pytest.raises(NonFiniteError, match=r"all steps \(1\) were skipped, so nothing was"):
            trainer.train()

    meta = find_checkpoint(config.run)[1]
    assert meta.branch is not None
    assert meta.updates == meta.branch.updates == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_a_non_finite_gradient_changes_no_weights(
    stage: int, config_of: Configs, training_world: World
) -> None:
    def make_infinite(output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.inf)

    # DeepSpeed's autocast, of bf16 at stage 0, would stay enabled in this process.
    training = {"steps": 4, "precision": "bf16" if stage else "fp32"}
    config = config_of(training=training, zero={"stage": stage})
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 1, make_infinite)
        trainer.train()

    assert lines_of(config, "skipped")[1].startswith("the gradient norm is ")
    losses = lines_of(config, "loss")
    assert losses[4] < losses[1]
    meta = find_checkpoint(config.run)[1]
    assert (meta.step, meta.updates) == (4, 3)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_fails_in_a_step_exits_without_a_reduction(
    stage: int, config_of: Configs, training_world: World
) -> None:
    def fail(_output: object) -> None:
        raise ZeroDivisionError

    config = config_of(zero={"stage": stage, "reduce_once": True})
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 2, fail)  # after the first of two micro-batches
        with pytest.raises(ZeroDivisionError):
            trainer.train()

    assert not any(run.engine.optimizer.averaged_gradients.values())


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


def both_directions(config_of: Configs, name: str, **validation: object) -> Config:
    return config_of(
        name,
        data={**config_of("usual").data.model_dump(mode="json"), "direction": "both"},
        validation={"every_steps": 2, **validation},
    )


def test_a_model_of_both_directions_has_their_losses_apart_also_after_a_resume(
    config_of: Configs, training_world: World
) -> None:
    whole = both_directions(config_of, "whole")
    config = both_directions(config_of, "run")
    train(whole, training_world)
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 2 * 2 + 1, signal_itself(signal.SIGTERM))
        with pytest.raises(PreemptedError):
            trainer.train()
    train(config, training_world)

    assert find_checkpoint(config.run)[1].text_format["direction"] == "both"
    losses, targets = lines_of(whole, "loss"), lines_of(whole, "targets")
    for step, parts in lines_of(whole, "by_direction").items():
        assert sum(part["targets"] for part in parts.values()) == targets[step]
        nats = sum(part["loss"] * part["targets"] for part in parts.values())
        assert nats / targets[step] == pytest.approx(losses[step])
    for line in read_metrics(whole.run):
        if "val_loss" in line:
            mean = sum(part["loss"] for part in line["val_by_direction"].values()) / 2
            assert line["val_loss"] == pytest.approx(mean, rel=1e-3)
    for field in ("loss", "by_direction", "val_by_direction"):
        assert lines_of(config, field) == lines_of(whole, field)


@pytest.mark.parametrize(
    ("direction", "is_read"), [(None, "an ending"), ("forward", "a beginning")]
)
def test_samples_of_a_model_of_both_are_in_the_asked_direction(
    config_of: Configs, training_world: World, direction: str | None, is_read: str
) -> None:
    config = both_directions(
        config_of, "run", samples=["the"], sample_tokens=3, direction=direction
    )
    train(config, training_world)

    texts = [sample["text"] for sample in read_samples(config.run)]
    assert texts
    is_kept = str.endswith if is_read == "an ending" else str.startswith
    assert all(is_kept(text, "the") for text in texts)


def test_a_model_of_both_starts_one_of_either_direction_and_not_the_reverse(
    config_of: Configs, training_world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    both = both_directions(config_of, "both")
    train(both, training_world)
    forward = {**config_of("usual").data.model_dump(mode="json"), "direction": "forward"}
    single = config_of("forward", data=forward, init_from=str(both.run))
    assert train(single, training_world) == "trained to the end"

    back = both.model_copy(update={"run": both.run.with_name("back"), "init_from": single.run})
    with pytest.raises(CollectiveExit):
        train(back, training_world)
    assert "has direction 'forward' and the run" in capsys.readouterr().err
