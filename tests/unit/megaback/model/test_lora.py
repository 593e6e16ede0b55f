import sys

import pytest
import torch

from data_pipeline.errors import BackendError
from megaback.config import OptimizerSection
from megaback.config_finetune import LoraSection
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import add_adapters, initial_adapters, with_updates
from megaback.model.mup import parameter_rule
from megaback.planning.adapters import adapter_shapes, factors_of_matrices
from tests.helpers.small_models import VOCAB_SIZE, make_model, packed, random_ids, section


def adapted(lora: LoraSection, seed: int = 4) -> ReverseGPT:
    """A small model with random adapters."""
    model = make_model()
    add_adapters(model, lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in adapter_shapes(section(), lora):
            factor = model.get_parameter(name)
            factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    "lora",
    [
        LoraSection(rank=4),
        LoraSection(rank=3, alpha=1, target_modules="all-linear"),
        LoraSection(rank=48, target_modules=("k_proj", "up_proj")),  # of the matrices' own size
    ],
)
def test_a_merged_model_has_the_logits_of_the_model_with_adapters(lora: LoraSection) -> None:
    model, base = adapted(lora), make_model()
    read = with_updates(
        factors_of_matrices(section(), lora),
        lora.scale,
        lambda name: base.get_parameter(name).detach().clone(),
        lambda name: model.get_parameter(name).detach(),
    )
    merged = make_model(seed=2)
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            weight.copy_(read(name))
    ids_T, (positions_T, segments) = random_ids(24), packed(9, 15)

    with torch.no_grad():
        of_adapters, of_base, of_merged = (
            one.logits(ids_T, positions_T, segments) for one in (model, base, merged)
        )

    scale = of_adapters.abs().max()
    assert (of_merged - of_adapters).abs().max() < 1e-5 * scale
    assert (of_base - of_adapters).abs().max() > 1e-2 * scale


def test_only_adapters_are_trained_and_they_have_the_planned_shapes() -> None:
    lora = LoraSection(rank=4, target_modules=("q_proj", "v_proj", "down_proj"))
    model = make_model()
    add_adapters(model, lora)

    trained = {
        name: tuple(weight.shape)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    assert list(trained.items()) == list(adapter_shapes(section(), lora).items())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_gradients_of_adapters_do_not_depend_on_checkpointing(checkpointing: str) -> None:
    lora = LoraSection(rank=4, target_modules=("down_proj",))
    ids_T, (positions_T, segments) = random_ids(24), packed(9, 15)
    gradients = []
    for kind in ("none", checkpointing):
        model = adapted(lora).train()
        model.checkpoint_activations(kind)
        model(ids_T, ids_T.roll(1), positions_T, segments).sum().backward()
        gradients.append(
            [model.get_parameter(name).grad for name in adapter_shapes(section(), lora)]
        )
        assert model.lm_head.weight.grad is None

    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


def test_a_model_starts_as_its_base_and_alike_everywhere() -> None:
    sizes = adapter_shapes(section(), LoraSection(rank=4))
    first, again, other = (dict(initial_adapters(sizes, seed)) for seed in (1, 1, 2))

    for name, size in sizes.items():
        assert torch.equal(first[name], again[name])
        if ".lora_B." in name:
            assert not first[name].any()
        else:
            assert not torch.equal(first[name], other[name])
            # As peft's: kaiming_uniform_ with a = sqrt(5).
            assert 0.9 < first[name].abs().max() * size[1] ** 0.5 <= 1


def test_the_learning_rate_of_adapters_does_not_depend_on_the_width() -> None:
    optimizer = OptimizerSection(learning_rate=1e-3, weight_decay=0.2)
    factor = torch.nn.Parameter(torch.zeros(4, 48))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"

    rule = parameter_rule(name, factor, section(base_width=12), optimizer)

    assert (rule.learning_rate, rule.weight_decay, rule.is_orthogonalized) == (1e-3, 0.2, False)


def test_a_missing_peft_is_an_error_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(BackendError, match=r"pip install 'megaback\[lora\]'"):
        add_adapters(make_model(), LoraSection(rank=4))


def test_a_tied_head_is_frozen_too() -> None:
    model = make_model(tie_embeddings=True)
    add_adapters(model, LoraSection(rank=4))

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.requires_grad
    assert model.lm_head.weight.shape == (VOCAB_SIZE, 48)
