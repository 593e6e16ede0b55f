"""Skipped arithmetic: zeros in the shapes, types and layouts of what would be computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from megaback.rehearsal.skipped_arithmetic import arithmetic_skipped


def attended(query: Tensor, other: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, other, other, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.matmul, [(5, 4), (4, 3)]),
        (torch.matmul, [(2, 5, 4), (2, 4, 3)]),
        (linear, [(2, 5, 4), (3, 4)]),
        (lambda a, b: linear(a, b, b[:, 0]), [(5, 4), (3, 4)]),
        (lambda a, b: torch.baddbmm(a, a, b, beta=2.0, alpha=0.5), [(2, 4, 4), (2, 4, 4)]),
        (attended, [(2, 3, 5, 8), (2, 3, 5, 8)]),
    ],
)
def test_results_and_gradients_are_zeros_laid_out_as_computed(
    function: Callable[[Tensor, Tensor], Tensor], shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    def run() -> list[Tensor]:
        inputs = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        result = function(*inputs)
        return [result, *torch.autograd.grad(result, inputs, torch.ones_like(result))]

    computed = run()
    with arithmetic_skipped():
        skipped = run()
    for real, zero in zip(computed, skipped, strict=True):
        assert (zero.shape, zero.dtype, zero.stride()) == (real.shape, real.dtype, real.stride())
    assert not skipped[0].any()
    assert all(torch.equal(one, again) for one, again in zip(computed, run(), strict=True))


def test_initial_weights_are_zeros() -> None:
    with arithmetic_skipped():
        weights = torch.nn.Linear(3, 2).weight
        assert not weights.any()
        assert not torch.ones(3).normal_(0.0, 1.0, generator=torch.Generator()).any()
    assert torch.nn.Linear(3, 2).weight.any()
