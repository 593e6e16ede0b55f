"""The optimizer's update on a fake GPU: no mixed devices, and the host never waits."""

import pytest
import torch
from torch import nn

from megaback.config import OptimizerSection
from megaback.distributed.engine import set_learning_rates
from megaback.optim.build import MatrixOptimizer, build_optimizer
from tests.helpers.fake_gpu import counted, gpu, moved, on_fake_gpu
from tests.helpers.small_models import make_model


class Engine:
    """The part of an engine that has learning rates."""

    def __init__(self, optimizer: MatrixOptimizer) -> None:
        self.optimizer = optimizer


def update(optimizer: MatrixOptimizer, model: nn.Module, step: int) -> None:
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + number)
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device)
    set_learning_rates(Engine(optimizer), 1 / (step + 1))
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@on_fake_gpu
def test_weights_are_those_of_the_cpu_without_a_copy_or_a_wait(name: str) -> None:
    section = OptimizerSection(name=name, learning_rate=1e-2, weight_decay=0.1)
    on_cpu, on_gpu = make_model(), moved(make_model())
    kernels = []
    optimizers = [
        build_optimizer(model.named_parameters(), model.shape, section)
        for model in (on_cpu, on_gpu)
    ]
    for step in range(3):
        update(optimizers[0], on_cpu, step)
        with counted() as traffic:
            update(optimizers[1], on_gpu, step)
        kernels.append(traffic.num_kernels)

    # Only the test's own gradients are sent.
    assert all("in update, tests/" in entry for entry in traffic.to_device), traffic
    assert all("in update, tests/" in entry for entry in traffic.syncs), traffic
    assert kernels[-1] <= (6 if name == "adamw" else 140), traffic
    for expected, found in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert found.device == gpu()
        torch.testing.assert_close(found.detach().cpu(), expected.detach())
