"""Shares of Muon's matrices equal those that the optimizer takes from ZeRO's slices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.config import ModelSection
from megaback.model.gpt import ReverseGPT
from megaback.optim.zero_matrices import Slice, choose_owners, slices_of_each, slices_of_flat
from megaback.planning.matrix_shares import matrices_of, matrix_share, matrix_shares

SHAPES = st.builds(
    ModelSection,
    num_layers=st.integers(1, 4),
    width=st.sampled_from([8, 16, 24]),
    num_heads=st.sampled_from([2, 4]),
    num_kv_heads=st.sampled_from([1, 2]),
    mlp_width=st.integers(5, 40),
)


def real_slices(shape: ModelSection, ranks: int, stage: int) -> list[list[Slice]]:
    """Slices as DeepSpeed cuts them: at stages 1 and 2 a flat tensor in multiples of two."""
    lengths = [rows * columns for rows, columns in matrices_of(shape)]
    if stage == 3:
        return slices_of_each([-(-length // ranks) for length in lengths], lengths, ranks)
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    return slices_of_flat(starts, lengths, 2 * -(-sum(lengths) // (2 * ranks)), ranks)


def test_matrices_are_those_of_the_model() -> None:
    shape = ModelSection(num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=40)
    blocks = ReverseGPT(shape.resolved(), 32).model.layers.named_parameters()
    assert matrices_of(shape) == tuple(tuple(one.shape) for _, one in blocks if one.ndim == 2)


@pytest.mark.parametrize("stage", [1, 3])
@given(SHAPES, st.integers(1, 70))
def test_shares_are_those_of_the_slices(stage: int, shape: ModelSection, ranks: int) -> None:
    matrices = matrices_of(shape)
    slices = real_slices(shape, ranks, stage)
    owners = choose_owners(matrices, slices)
    for rank in range(ranks):
        share = matrix_share(shape, ranks, stage, rank)
        numbers = [number for number, owner in enumerate(owners) if owner == rank]
        assert share.held == sum(one.length for one in slices[rank])
        assert share.owned == tuple(matrices[number] for number in numbers)
        assert share.kept == sum(slices[rank][number].length for number in numbers)


def test_shares_of_all_ranks_include_one_without_a_matrix() -> None:
    shape = ModelSection(num_layers=1, width=16, num_heads=4)
    shares = matrix_shares(shape, 100, 1)
    assert [len(share.owned) for share in shares] == [1] * 7 + [0]
    assert shares[-1].sent_elements == shares[-1].held > 0
    assert sum(len(share.owned) for share in matrix_shares(shape, 2, 3)) == 7
