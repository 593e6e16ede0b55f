"""Slices of matrices that ranks exchange (exchanged by tests/integration/test_many_ranks.py)."""

import torch

from megaback.optim.zero_matrices import MatrixShards, slices_of_flat

RANKS, MATRICES, ELEMENTS = 512, 20, 64 * 64


def test_a_rank_of_many_exchanges_only_slices_that_have_elements() -> None:
    lengths = [ELEMENTS] * MATRICES
    starts = [ELEMENTS * number for number in range(MATRICES)]
    slices = slices_of_flat(starts, lengths, -(-sum(lengths) // RANKS), RANKS)
    all_shards = [
        MatrixShards([(64, 64)] * MATRICES, slices, rank, torch.device("cpu"))
        for rank in range(RANKS)
    ]
    num_lent = [len(shards._lent) for shards in all_shards]
    num_owned = [len(shards._owned) for shards in all_shards]
    assert max(num_lent) == 2  # its partition has the end of one matrix and the start of the next
    assert max(num_owned) <= RANKS // MATRICES + 2
    assert sum(num_lent) == sum(num_owned)
