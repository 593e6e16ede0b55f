"""The loss in chunks of tokens, compared with that of whole logits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.loading.rows import IGNORED_TARGET
from megaback.model.gpt import ReverseGPT
from megaback.model.output_head import OutputHead
from tests.helpers.small_models import VOCAB_SIZE, packed, random_ids, section
from tests.helpers.whole_loss import whole_loss


def inputs(
    seed: int, tokens: int, width: int, vocab_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight and targets, about a quarter of which are ignored."""
    draws = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, width, generator=draws).to(dtype)
    weight_VD = torch.randn(vocab_size, width, generator=draws).to(dtype)
    targets_T = torch.randint(0, vocab_size, (tokens,), generator=draws)
    targets_T[torch.rand(tokens, generator=draws) < 0.25] = IGNORED_TARGET
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), targets_T


def head_of(weight_VD: Tensor, chunk_tokens: int) -> OutputHead:
    vocab_size, width = weight_VD.shape
    head = OutputHead(width, vocab_size, chunk_tokens)
    head.weight = torch.nn.Parameter(weight_VD.detach())
    return head


def error_of(found: Tensor | None, expected: Tensor | None) -> float:
    """Relative to the largest expected value."""
    assert found is not None
    assert expected is not None
    scale = max(float(expected.abs().max()), 1e-30)
    return float((found.double() - expected.double()).abs().max()) / scale


SHAPES = {
    "seed": st.integers(0, 1 << 20),
    "tokens": st.integers(1, 40),
    "width": st.integers(1, 24),
    "vocab_size": st.integers(2, 60),
    "chunk_tokens": st.integers(1, 50),
    "z_loss": st.sampled_from([0.0, 1e-4, 0.1]),
}


@settings(deadline=None)
@given(**SHAPES, factor=st.sampled_from([1.0, 0.37, 1e-4]))
def test_in_fp32_losses_and_gradients_are_those_of_whole_logits(
    seed: int,
    tokens: int,
    width: int,
    vocab_size: int,
    chunk_tokens: int,
    z_loss: float,
    factor: float,
) -> None:
    hidden_TD, weight_VD, targets_T = inputs(seed, tokens, width, vocab_size, torch.float32)
    head = head_of(weight_VD, chunk_tokens)
    own_TD = hidden_TD.detach().requires_grad_()

    expected_T = whole_loss(hidden_TD, weight_VD, targets_T, z_loss)
    found_T = head(own_TD, targets_T, z_loss)
    (expected_T.sum() * factor).backward()
    (found_T.sum() * factor).backward()

    # A loss is the difference of logits, and no more exact than the largest of them.
    largest = float((hidden_TD @ weight_VD.T).detach().abs().max())
    torch.testing.assert_close(found_T, expected_T, rtol=1e-6, atol=1e-6 * max(1.0, largest))
    assert error_of(own_TD.grad, hidden_TD.grad) < 1e-5
    assert error_of(head.weight.grad, weight_VD.grad) < 1e-5


@settings(deadline=None)
@given(**SHAPES)
def test_in_bf16_gradients_are_as_precise_as_those_of_whole_logits(
    seed: int, tokens: int, width: int, vocab_size: int, chunk_tokens: int, z_loss: float
) -> None:
    hidden_TD, weight_VD, targets_T = inputs(seed, tokens, width, vocab_size, torch.bfloat16)
    head = head_of(weight_VD, chunk_tokens)
    own_TD = hidden_TD.detach().requires_grad_()
    exact_TD, exact_VD = (one.detach().double().requires_grad_() for one in (hidden_TD, weight_VD))

    expected_T = whole_loss(hidden_TD, weight_VD, targets_T, z_loss)
    found_T = head(own_TD, targets_T, z_loss)
    for losses_T in (expected_T, found_T, whole_loss(exact_TD, exact_VD, targets_T, z_loss)):
        losses_T.sum().backward()

    # A loss is the difference of logits, and no more exact than the largest of them.
    largest = float((hidden_TD @ weight_VD.T).detach().abs().max())
    torch.testing.assert_close(found_T, expected_T, rtol=1e-6, atol=1e-6 * max(1.0, largest))
    assert own_TD.grad is not None
    assert own_TD.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    for found, usual, exact in (
        (own_TD.grad, hidden_TD.grad, exact_TD.grad),
        (head.weight.grad, weight_VD.grad, exact_VD.grad),
    ):
        assert error_of(found, exact) <= 2 * error_of(usual, exact) + 2**-8


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("is_autocast", [False, True], ids=["fp32", "autocast"])
def test_all_gradients_of_the_model_are_those_of_whole_logits(
    is_autocast: bool, tie_embeddings: bool
) -> None:
    shape = section(tie_embeddings=tie_embeddings)
    model = ReverseGPT(shape, VOCAB_SIZE, z_loss=0.01, loss_chunk_tokens=7).train()
    model.initialize(1)
    ids_T, targets_T = random_ids(30), random_ids(30, seed=1)
    targets_T[4:9] = IGNORED_TARGET
    gradients: list[list[Tensor]] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        hidden_TD = model.hidden(ids_T, *packed(20, 10))
        expected_T = whole_loss(hidden_TD, model.lm_head.weight, targets_T, 0.01)
        found_T = model(ids_T, targets_T, *packed(20, 10))
    for losses_T in (expected_T, found_T):
        model.zero_grad()
        losses_T.mean().backward()
        gradients.append([one.grad for one in model.parameters() if one.grad is not None])

    tolerance = 2e-2 if is_autocast else 1e-5
    torch.testing.assert_close(found_T, expected_T, rtol=1e-6, atol=1e-6)
    for expected, found in zip(*gradients, strict=True):
        assert error_of(found, expected) < tolerance


def test_any_chunk_gives_the_same_losses_without_gradients() -> None:
    hidden_TD, weight_VD, targets_T = inputs(3, 33, 8, 20, torch.float32)
    expected_T = whole_loss(hidden_TD, weight_VD, targets_T)

    with torch.no_grad():
        for chunk_tokens in (1, 8, 32, 33, 1000):
            found_T = head_of(weight_VD, chunk_tokens)(hidden_TD, targets_T, 0.5)
            torch.testing.assert_close(found_T, expected_T, rtol=1e-6, atol=1e-6)
            assert not found_T.requires_grad


def test_losses_that_are_weighted_differently_are_refused() -> None:
    hidden_TD, weight_VD, targets_T = inputs(3, 12, 8, 20, torch.float32)
    losses_T = head_of(weight_VD, 5)(hidden_TD, targets_T)

    with pytest.raises(RuntimeError, match="can only be summed, not weighted"):
        (losses_T * torch.arange(12)).sum().backward()


class _LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = function(*arguments, **(options or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


def test_no_tensor_is_larger_than_the_logits_of_a_chunk() -> None:
    hidden_TD, weight_VD, targets_T = inputs(3, 1000, 4, 500, torch.float32)
    head = head_of(weight_VD, 50)

    with _LargestTensor() as seen:
        head(hidden_TD, targets_T, 0.1).sum().backward()

    assert seen.elements == 50 * 500


def test_the_loss_is_compiled_as_one_graph() -> None:
    hidden_TD, weight_VD, targets_T = inputs(3, 20, 8, 30, torch.float32)
    head = head_of(weight_VD, 6)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    results = []
    for call in (head, compiled):
        hidden_TD.grad = head.weight.grad = None
        losses_T = call(hidden_TD, targets_T, 0.1)
        (losses_T.sum() * 0.3).backward()
        results.append((losses_T, hidden_TD.grad, head.weight.grad))

    torch.testing.assert_close(*results)
