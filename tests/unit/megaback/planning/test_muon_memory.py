"""Memory of Muon's update: counted, and allocated by the optimizer."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megaback.config import ModelSection
from megaback.optim.muon import orthogonalized
from megaback.optim.zero_matrices import MatrixShards, slices_of_flat
from megaback.planning.matrix_shares import matrices_of, matrix_share
from megaback.planning.muon_memory import exchange_bytes, orthogonal_elements
from megaback.rehearsal.collectives import CollectiveLog, RehearsalGroup

SHAPE = ModelSection(num_layers=1, width=64, num_heads=4, num_kv_heads=1, mlp_width=200)
MATRICES = matrices_of(SHAPE)
DTYPES = {4: torch.float32, 2: torch.bfloat16}


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest number of bytes that are allocated at a time, without oneDNN's copies of operands.

    It multiplies bf16 matrices where the CPU has instructions for them.
    """
    one_dnn = torch.backends.mkldnn.flags(enabled=False)
    with one_dnn, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    peak = allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("size", [4, 2])
def test_orthogonalizing_allocates_what_is_counted(size: int) -> None:
    matrices = [torch.randn(shape).to(DTYPES[size]) for shape in MATRICES]
    counted = size * orthogonal_elements(MATRICES)
    assert peak_bytes(lambda: orthogonalized(matrices)) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1), (16, 0), (16, 15)])
def test_a_rank_of_many_allocates_what_is_counted(
    ranks: int, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [rows * columns for rows, columns in MATRICES]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    partition = -(-sum(lengths) // ranks)
    slices = slices_of_flat(starts, lengths, partition, ranks)
    shards = MatrixShards(MATRICES, slices, rank, torch.device("cpu"))
    collective = RehearsalGroup(rank, ranks, CollectiveLog()).all_to_all_single
    monkeypatch.setattr(
        torch.distributed, "all_to_all_single", lambda *arguments, **_: collective(*arguments)
    )
    flat = torch.randn(partition)
    share = matrix_share(SHAPE, ranks, 1, rank)
    found = peak_bytes(lambda: shards.apply(orthogonalized, flat, DTYPES[size]))
    assert found == pytest.approx(exchange_bytes(share, ranks, size), rel=0.02)
