"""Gradients that a rank keeps: those of all parameters that reach into its slices."""

import pytest

from megaback.config import ModelSection
from megaback.planning.flops import ModelSize
from megaback.planning.gradient_buffer import kept_elements
from megaback.planning.matrix_shares import matrices_of

SHAPE = ModelSection(num_layers=3, width=16, num_heads=4, num_kv_heads=2, mlp_width=40)
VOCAB_SIZE = 100
SIZE = ModelSize.of(SHAPE, VOCAB_SIZE)
MATRICES = [rows * columns for rows, columns in matrices_of(SHAPE)]
GROUPS = {
    "adamw": [[SIZE.embedding, *MATRICES, SIZE.head], [SIZE.norms]],
    "muon": [[SIZE.embedding, SIZE.head], MATRICES, [SIZE.norms]],
}


def kept_by(rank: int, ranks: int, lengths: list[int]) -> int:
    """Elements of the parameters of a group that share an element with a rank's slice."""
    partition = -(-sum(lengths) // ranks)
    slice_ = range(rank * partition, min((rank + 1) * partition, sum(lengths)))
    kept = start = 0
    for length in lengths:
        if max(start, slice_.start) < min(start + length, slice_.stop):
            kept += length
        start += length
    return kept


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ranks", [1, 2, 7, 64, 1_000])
def test_whole_parameters_that_reach_into_a_slice_are_counted(optimizer: str, ranks: int) -> None:
    expected = [
        sum(kept_by(rank, ranks, lengths) for lengths in GROUPS[optimizer]) for rank in range(ranks)
    ]
    found = [kept_elements(SHAPE, VOCAB_SIZE, optimizer, ranks, rank) for rank in range(ranks)]
    assert found == expected
    assert kept_elements(SHAPE, VOCAB_SIZE, optimizer, ranks, None) == max(expected)
