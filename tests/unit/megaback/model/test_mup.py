"""muP: transfer of learning rates across widths, initial weights, and rules of parameters."""

import math

import pytest
import torch

from benchmarks.widths.activations import VOCAB_SIZE, changes
from megaback.config import ModelSection, OptimizerSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.model.mup import initial_std, parameter_rule

TOKENS = 64


def shape(width: int, **changes: object) -> ModelSection:
    fields = {"num_layers": 2, "width": width, "num_heads": width // 16, "mlp_width": 3 * width}
    return ModelSection.model_validate({**fields, **changes})


def section(name: str = "adamw", **changes: object) -> OptimizerSection:
    fields = {"name": name, "learning_rate": 0.01, "weight_decay": 0.1}
    return OptimizerSection.model_validate({**fields, **changes})


def change_of_the_hidden_state(
    model_shape: ModelSection, optimizer_section: OptimizerSection
) -> float:
    return changes(model_shape, optimizer_section, 4, 1)["residual"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_with_a_base_width_a_learning_rate_changes_narrow_and_wide_models_alike(
    name: str,
) -> None:
    narrow = change_of_the_hidden_state(shape(64, base_width=64), section(name))
    wide = change_of_the_hidden_state(shape(512, base_width=64), section(name))

    assert 0.5 < wide / narrow < 2


def test_without_a_base_width_a_learning_rate_changes_a_wide_model_far_more() -> None:
    narrow = change_of_the_hidden_state(shape(64), section())
    wide = change_of_the_hidden_state(shape(512), section())

    assert wide / narrow > 3


def test_at_its_base_width_a_model_equals_one_without() -> None:
    plain, based = ReverseGPT(shape(64), 50), ReverseGPT(shape(64, base_width=64), 50)
    for model in (plain, based):
        model.initialize(3)

    for (name, one), other in zip(plain.named_parameters(), based.parameters(), strict=True):
        assert torch.equal(one, other), name
        rules = [parameter_rule(name, one, model.shape, section()) for model in (plain, based)]
        assert rules[0] == rules[1], name


def test_initial_residual_matrices_are_smaller_in_deeper_models() -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    few, many = (shape(64, num_layers=layers) for layers in (2, 8))

    assert initial_std(name, few) == pytest.approx(2 * initial_std(name, many))
    assert initial_std(name, few) == pytest.approx(0.02 / math.sqrt(4))


def test_zero_output_projections_make_every_block_the_identity() -> None:
    model = ReverseGPT(shape(64, zero_output_projections=True), VOCAB_SIZE)
    model.initialize(1)
    ids_T = torch.arange(TOKENS)

    hidden_TD = model.hidden(
        ids_T, torch.arange(TOKENS), Segments.from_lengths((TOKENS,), torch.device("cpu"))
    )

    expected_TD = model.model.norm(model.model.embed_tokens(ids_T))
    torch.testing.assert_close(hidden_TD, expected_TD, atol=0, rtol=0)


def test_a_zero_head_predicts_a_uniform_distribution() -> None:
    model = ReverseGPT(shape(64, zero_head=True), VOCAB_SIZE)
    model.initialize(1)
    ids_T = torch.arange(TOKENS)
    segments = Segments.from_lengths((TOKENS,), torch.device("cpu"))

    nats_T = model(ids_T, ids_T, torch.arange(TOKENS), segments)

    assert nats_T.mean().item() == pytest.approx(math.log(VOCAB_SIZE))


def test_muon_updates_only_the_matrices_of_blocks() -> None:
    model = ReverseGPT(shape(64), 50)

    for name, parameter in model.named_parameters():
        rule = parameter_rule(name, parameter, model.shape, section("muon"))
        assert rule.is_orthogonalized == ("_proj" in name), name


def test_muons_own_learning_rate_applies_to_its_matrices_only() -> None:
    model = ReverseGPT(shape(64), 50)
    numbers = section("muon", matrix_learning_rate=0.5)

    for name, parameter in model.named_parameters():
        rate = parameter_rule(name, parameter, model.shape, numbers).learning_rate
        assert rate == (0.5 if "_proj" in name else 0.01), name
