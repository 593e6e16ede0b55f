"""Muon's update compared with PyTorch's, and its independence of ZeRO's slices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megaback.config import OptimizerSection
from megaback.optim.build import MatrixOptimizer
from megaback.optim.muon import newton_schulz, orthogonalized
from megaback.optim.zero_matrices import MatrixShards, choose_owners, slices_of_each, slices_of_flat

CPU = torch.device("cpu")
SHAPES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


def section() -> OptimizerSection:
    return OptimizerSection(name="muon", learning_rate=0.01, momentum=0.9, weight_decay=0.2)


def optimizer_of(weights: list[Tensor], matrix_dtype: torch.dtype) -> MatrixOptimizer:
    group = {"params": weights, "orthogonalize": True, "weight_decay": 0.2}
    return MatrixOptimizer([group], section(), matrix_dtype)


def test_steps_equal_those_of_pytorchs_muon() -> None:
    shapes = [(8, 8), (8, 24), (24, 8), (16, 40)]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    ours = [torch.nn.Parameter(weight.clone()) for weight in start]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in start]
    optimizers = [
        optimizer_of(list(ours), torch.bfloat16),
        torch.optim.Muon(
            theirs, lr=0.01, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    for one, other, before in zip(ours, theirs, start, strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() < 0.02 * moved  # both compute in bf16, in another order


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_singular_values_are_near_1_times_the_scale(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    (result,) = orthogonalized([matrix])

    values = torch.linalg.svdvals(result) / (0.2 * math.sqrt(max(shape)))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_singular_vectors_are_preserved() -> None:
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(4))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)

    inside = left.T @ newton_schulz(matrix[None])[0] @ right.T

    assert (inside - torch.diag(inside.diag())).abs().max() < 1e-4


def test_with_a_zero_gradient_only_weight_decay_applies() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)

    optimizer_of([weight], torch.float32).step()

    torch.testing.assert_close(weight.data, torch.full((4, 6), 1 - 0.01 * 0.2))


def flat_and_cuts(
    shapes: list[tuple[int, int]], world_size: int, stage: int
) -> tuple[list[Tensor], list[Tensor], list[list[object]]]:
    """Random matrices, the flat slice of each rank, and the slices of matrices in them."""
    generator = torch.Generator().manual_seed(len(shapes) * 100 + world_size)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    lengths = [matrix.numel() for matrix in matrices]
    if stage == 3:
        partitions = [-(-length // world_size) for length in lengths]
        padded = [
            torch.cat([matrix.flatten(), torch.zeros(size * world_size - matrix.numel())])
            for matrix, size in zip(matrices, partitions, strict=True)
        ]
        flats = [
            torch.cat([whole.view(world_size, -1)[rank] for whole in padded])
            for rank in range(world_size)
        ]
        return matrices, flats, slices_of_each(partitions, lengths, world_size)  # type: ignore[return-value]
    together = torch.cat([matrix.flatten() for matrix in matrices])
    partition = -(-len(together) // world_size)
    padded_flat = torch.cat([together, torch.zeros(partition * world_size - len(together))])
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    slices = slices_of_flat(starts, lengths, partition, world_size)
    return matrices, list(padded_flat.view(world_size, -1)), slices  # type: ignore[return-value]


@settings(max_examples=100)
@given(shapes=SHAPES, world_size=st.integers(1, 5), stage=st.sampled_from([1, 3]))
def test_slices_contain_every_element_of_every_matrix_once(
    shapes: list[tuple[int, int]], world_size: int, stage: int
) -> None:
    matrices, flats, slices = flat_and_cuts(shapes, world_size, stage)

    for number, matrix in enumerate(matrices):
        rebuilt = torch.full((matrix.numel(),), torch.nan)
        seen = 0
        for rank, flat in enumerate(flats):
            one = slices[rank][number]
            local = flat[one.local_start : one.local_start + one.length]  # type: ignore[attr-defined]
            rebuilt[one.matrix_start : one.matrix_start + one.length] = local  # type: ignore[attr-defined]
            seen += one.length  # type: ignore[attr-defined]
        assert seen == matrix.numel()
        assert torch.equal(rebuilt, matrix.flatten())


@settings(max_examples=100)
@given(shapes=SHAPES, world_size=st.integers(1, 5), stage=st.sampled_from([1, 3]))
def test_a_matrix_is_gathered_on_a_rank_that_holds_most_of_it(
    shapes: list[tuple[int, int]], world_size: int, stage: int
) -> None:
    _, _, slices = flat_and_cuts(shapes, world_size, stage)

    for number, owner in enumerate(choose_owners(shapes, slices)):  # type: ignore[arg-type]
        held = [of_rank[number].length for of_rank in slices]  # type: ignore[attr-defined]
        assert held[owner] == max(held)


def test_equal_matrices_are_spread_over_the_ranks() -> None:
    shapes = [(4, 4)] * 12
    _, _, slices = flat_and_cuts(shapes, 4, stage=3)

    owners = choose_owners(shapes, slices)  # type: ignore[arg-type]

    assert sorted(owners) == sorted(list(range(4)) * 3)


@given(shapes=SHAPES, stage=st.sampled_from([1, 3]))
def test_the_result_on_one_rank_equals_that_of_whole_matrices(
    shapes: list[tuple[int, int]], stage: int
) -> None:
    matrices, flats, slices = flat_and_cuts(shapes, 1, stage)

    found = MatrixShards(shapes, slices, 0, CPU).apply(orthogonalized, flats[0], torch.float32)  # type: ignore[arg-type]

    expected = torch.cat([matrix.flatten() for matrix in orthogonalized(matrices)])
    torch.testing.assert_close(found[: len(expected)], expected)
