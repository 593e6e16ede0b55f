"""Training steps on a fake GPU: the host waits once per step, for the gradient norm."""

from dataclasses import replace
from functools import partial
from time import monotonic
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loading.rows import Batch
from megaback.config import OptimizerSection
from megaback.config_operation import GuardSection
from megaback.faults.step_guard import StepGuard
from megaback.optim.build import build_optimizer
from megaback.training.agreement import StepAhead
from megaback.training.device_batches import DeviceBatches
from megaback.training.trainer import Trainer
from megaback.training.validation import to_device
from tests.helpers.device_traffic import Traffic
from tests.helpers.fake_gpu import counted, gpu, moved, on_fake_gpu
from tests.helpers.small_models import CPU, make_model, random_ids

LENGTHS = (7, 1, 12)
ACCUMULATION_STEPS = 2
OPTIMIZER = OptimizerSection(learning_rate=1e-2, warmup_steps=0)


def batches_of(step: int) -> list[Batch]:
    return [
        Batch(
            ids_T=random_ids(sum(LENGTHS), seed).numpy(),
            targets_T=random_ids(sum(LENGTHS), seed + 1).numpy(),
            cu_seqlens=np.array([0, *np.cumsum(LENGTHS)], dtype=np.int32),
            num_targets=sum(LENGTHS),
            num_skipped_rows=0,
        )
        for seed in range(10 * step, 10 * step + ACCUMULATION_STEPS)
    ]


class Engine:
    """An engine at stage 0 without DeepSpeed, which has waits of its own."""

    seq_data_parallel_group = None
    reduces_once = False

    def __init__(self, model: Any) -> None:
        self.module = model.train()
        named = model.named_parameters()
        self.optimizer = build_optimizer(named, model.shape, OPTIMIZER)
        self.basic_optimizer = self.optimizer
        self._num_micro_batches = 0

    def __call__(self, *arguments: Any) -> Tensor:
        losses_T: Tensor = self.module(*arguments)
        return losses_T

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._num_micro_batches += 1
        if self._num_micro_batches % ACCUMULATION_STEPS == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


class OneRankTrainer(Trainer):
    """The loop's body on one rank, without a run's folder."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._run: Any = SimpleNamespace(
            engine=Engine(model),
            start_step=0,
            compiler=None,
            watchdog=SimpleNamespace(set_phase=lambda *_: None),
            config=SimpleNamespace(optimizer=OPTIMIZER, batch=SimpleNamespace(global_batch_rows=1)),
            data=SimpleNamespace(
                total_steps=10,
                accumulation_steps=ACCUMULATION_STEPS,
                batches_at=batches_of,
                rows_by_data_set=lambda *_: None,
            ),
        )
        maxima = SimpleNamespace(result=lambda: [0.0, 1.0])
        self._world: Any = SimpleNamespace(size=1, device=device, begin_max=lambda *_: maxima)
        stop: Any = SimpleNamespace(reason=None)
        checkpoints: Any = SimpleNamespace(is_writing=False, is_copying=False)
        self._guard = StepGuard(GuardSection(), [])
        self._log = self._log_error = None
        self._forward_time = None
        self._ahead = StepAhead(self._run, self._world, stop, checkpoints)
        self._batches = DeviceBatches(device, partial(to_device, device=device))

    def take_steps(self, number: int) -> None:
        self._ahead.read(0)
        self._ahead.begin(None)
        for step in range(number):
            self.take_step(step)

    def take_step(self, step: int) -> None:
        micro_batches, agreed = self._ahead.take()
        self._ahead.read(step + 1)
        self._train_step(step, micro_batches, agreed, monotonic())


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An all-reduce of one rank."""
    work = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: work)


def traffic_of_a_step(trainer: OneRankTrainer) -> Traffic:
    trainer.take_steps(2)
    with counted() as traffic:
        trainer.take_step(2)
    return traffic


@pytest.mark.usefixtures("_alone")
@on_fake_gpu
def test_the_host_waits_once_per_step() -> None:
    traffic = traffic_of_a_step(OneRankTrainer(moved(make_model()), gpu()))

    (sync,) = traffic.syncs
    assert "megaback/distributed/engine.py" in sync
    # The batches of the next step, with two tensors for sdpa's groups, and numbers to agree on.
    assert len(traffic.to_device) == (3 + 2) * ACCUMULATION_STEPS + 1, traffic
    assert len(traffic.to_host) == 1, traffic


def of_both(trainer: OneRankTrainer) -> OneRankTrainer:
    """The trainer with batches of rows in both directions: five tokens each."""
    is_forward_N = np.array([True, False, False, True])
    trainer._run.data.batches_at = lambda step: [
        replace(batch, is_forward_N=is_forward_N, num_forward_targets=10)
        for batch in batches_of(step)
    ]
    return trainer


@pytest.mark.usefixtures("_alone")
@on_fake_gpu
def test_losses_of_both_directions_are_apart_without_a_wait() -> None:
    on_gpu = of_both(OneRankTrainer(moved(make_model()), gpu()))
    on_cpu = of_both(OneRankTrainer(make_model(), CPU))
    on_cpu.take_steps(3)

    traffic = traffic_of_a_step(on_gpu)

    assert len(traffic.syncs) == 1
    assert len(traffic.to_device) == (3 + 2 + 1) * ACCUMULATION_STEPS + 1, traffic
    assert len(traffic.to_host) == 1, traffic
    expected = on_cpu._ahead.forward_nats()
    assert on_gpu._ahead.forward_nats() == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < on_cpu._ahead.nats()


@pytest.mark.usefixtures("_alone")
@on_fake_gpu
def test_a_planted_wait_is_found() -> None:
    trainer = OneRankTrainer(moved(make_model()), gpu())
    verdict = trainer._guard.verdict

    def slower(loss: float, gradient_norm: float | None) -> str | None:
        float(next(trainer._run.engine.module.parameters()).sum())
        return verdict(loss, gradient_norm)

    trainer._guard.verdict = slower  # type: ignore[method-assign]

    assert len(traffic_of_a_step(trainer).syncs) > 1


@pytest.mark.usefixtures("_alone")
@on_fake_gpu
def test_weights_after_steps_are_those_of_the_cpu() -> None:
    on_cpu, on_gpu = make_model(), moved(make_model())

    OneRankTrainer(on_cpu, CPU).take_steps(3)
    OneRankTrainer(on_gpu, gpu()).take_steps(3)

    for expected, found in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(found.detach().cpu(), expected.detach())
