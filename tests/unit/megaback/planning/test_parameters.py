"""Orders and groups of the planned parameters, beside those of the model and its optimizer."""

import pytest
import torch
from torch import nn

from megaback.config import ModelSection, OptimizerSection
from megaback.config_finetune import LoraSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import add_adapters
from megaback.optim.build import build_optimizer
from megaback.planning.parameters import Parameters

ADAMW = OptimizerSection(learning_rate=1e-3, weight_decay=0.1)
VOCAB_SIZE = 60
SHAPES = [
    ModelSection(num_layers=2, width=32, num_heads=4, num_kv_heads=2),
    ModelSection(num_layers=3, width=32, num_heads=4, qk_norm=False, tie_embeddings=True),
    ModelSection(num_layers=1, width=64, num_heads=4, base_width=32),
]


def sizes(model: nn.Module) -> list[tuple[str, int]]:
    return [(short(name), one.numel()) for name, one in model.named_parameters()]


def short(name: str) -> str:
    """Name as in the plan."""
    words = name.removesuffix(".weight").removesuffix(".base_layer").split(".")
    if words[-1] == "default":  # of peft
        return f"{words[2]}.{words[-3]}.{words[-2]}"
    return f"{words[2]}.{words[-1]}" if "layers" in words else words[-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_model_in_its_order(shape: ModelSection) -> None:
    found = Parameters.of(shape, VOCAB_SIZE).in_order

    assert [(one.name, one.elements) for one in found] == sizes(ReverseGPT(shape, VOCAB_SIZE))


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_completed_in_the_planned_order(
    shape: ModelSection, checkpointing: str
) -> None:
    model = ReverseGPT(shape, VOCAB_SIZE, activation_checkpointing=checkpointing)
    found: list[str] = []
    for name, one in model.named_parameters():
        one.register_post_accumulate_grad_hook(lambda _, name=name: found.append(short(name)))  # type: ignore[misc]
    ids_T = torch.arange(8)

    model(ids_T, ids_T, ids_T, Segments.from_lengths((8,), ids_T.device)).sum().backward()

    assert found == [one.name for one in Parameters.of(shape, VOCAB_SIZE).in_backward_order]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear", ("down_proj",)])
def test_factors_of_lora_are_those_of_the_model(targets: str | tuple[str, ...]) -> None:
    lora = LoraSection.model_validate({"rank": 4, "target_modules": targets})
    model = ReverseGPT(SHAPES[0], VOCAB_SIZE)
    add_adapters(model, lora)
    found: list[str] = []
    for name, one in model.named_parameters():
        if one.requires_grad:
            one.register_post_accumulate_grad_hook(lambda _, name=name: found.append(short(name)))  # type: ignore[misc]
    ids_T = torch.arange(8)
    model(ids_T, ids_T, ids_T, Segments.from_lengths((8,), ids_T.device)).sum().backward()

    planned = Parameters.of(SHAPES[0], VOCAB_SIZE, lora)

    assert [(one.name, one.elements) for one in planned.in_order] == sizes(model)
    assert [one.name for one in planned.in_backward_order] == found
    groups = build_optimizer(model.named_parameters(), SHAPES[0], ADAMW).param_groups
    trained = [[one for one in group["params"] if one.requires_grad] for group in groups]
    assert [[one.elements for one in group] for group in planned.groups(SHAPES[0], ADAMW)] == [
        [one.numel() for one in group] for group in trained if group
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_are_those_of_the_optimizer(
    shape: ModelSection, name: str, weight_decay: float
) -> None:
    section = OptimizerSection.model_validate(
        {"name": name, "learning_rate": 1e-3, "weight_decay": weight_decay}
    )
    model = ReverseGPT(shape, VOCAB_SIZE)
    groups = build_optimizer(model.named_parameters(), shape, section).param_groups

    found = Parameters.of(shape, VOCAB_SIZE).groups(shape, section)

    assert [[one.elements for one in group] for group in found] == [
        [one.numel() for one in group["params"]] for group in groups
    ]
