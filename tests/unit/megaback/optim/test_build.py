"""Parameter groups and updates of the optimizer."""

from typing import Any

import pytest
import torch

from megaback.config import ModelSection, OptimizerSection
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import MatrixOptimizer, build_optimizer

MODEL = ModelSection(num_layers=2, width=32, num_heads=4)


def built(**options: Any) -> tuple[MatrixOptimizer, ReverseGPT]:
    """An optimizer, and its model with a gradient of ones."""
    model = ReverseGPT(MODEL, 50)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    section = OptimizerSection(learning_rate=3e-4, weight_decay=0.3, **options)
    return build_optimizer(model.named_parameters(), model.shape, section), model


def values_of(optimizer: MatrixOptimizer, key: str) -> dict[int, Any]:
    """Value of a key of its group for each parameter, by id."""
    return {
        id(parameter): group[key]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def copies(model: ReverseGPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name: str) -> None:
    optimizer, model = built(name=name)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]

    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_weight_decay_applies_to_matrices_only() -> None:
    optimizer, model = built()
    decay = values_of(optimizer, "weight_decay")

    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name


def test_adamw_has_the_hyperparameters_of_the_config() -> None:
    optimizer, _ = built(beta1=0.8, epsilon=1e-7)

    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-7)


def test_only_muon_orthogonalizes_and_only_the_matrices_of_layers() -> None:
    assert not any(group["orthogonalize"] for group in built()[0].param_groups)

    optimizer, model = built(name="muon")
    orthogonalize = values_of(optimizer, "orthogonalize")
    for name, parameter in model.named_parameters():
        is_of_layer = parameter.ndim == 2 and ".layers." in name
        assert orthogonalize[id(parameter)] == is_of_layer, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_changes_every_parameter_and_a_skipped_one_changes_none(name: str) -> None:
    optimizer, model = built(name=name)
    before = copies(model)

    optimizer.must_skip = lambda: True
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in copies(model).items())

    optimizer.must_skip = lambda: False
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in copies(model).items())
