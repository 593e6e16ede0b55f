"""Errors for limits of the hardware, before the first step."""

import psutil
import pytest
import torch

from data_pipeline.errors import BackendError
from megaback.distributed.device_limits import (
    device_peak_flops,
    peak_memory_bytes,
    require_host_memory,
    require_precision,
)

CPU = torch.device("cpu")


def test_offload_that_exceeds_the_hosts_memory_is_refused_with_both_sizes() -> None:
    with pytest.raises(BackendError, match=r"optimizer keeps 160000\.0 GB .* GB are free"):
        require_host_memory("optimizer", 10**13, "bf16", ranks_here=1, world_size=1)


def test_peak_memory_is_in_bytes_and_does_not_fall_when_memory_is_freed() -> None:
    before = peak_memory_bytes(CPU)
    resident = psutil.Process().memory_info().rss
    assert before >= resident * 0.95
    more = max(before - resident, 0) + 50_000_000
    held = torch.ones(more, dtype=torch.uint8)
    with_more = peak_memory_bytes(CPU)
    del held

    assert before + 40_000_000 < with_more < before + 200_000_000
    assert peak_memory_bytes(CPU) >= with_more * 0.98  # the kernel's counters are approximate


@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_offload_that_fits_is_accepted(offload: str) -> None:
    require_host_memory(offload, 10_000, "bf16", ranks_here=2, world_size=2)


def test_a_host_needs_memory_for_the_share_of_its_own_ranks() -> None:
    num_parameters = psutil.virtual_memory().available // 16 * 4

    require_host_memory("optimizer", num_parameters, "bf16", ranks_here=1, world_size=8)
    with pytest.raises(BackendError):
        require_host_memory("optimizer", num_parameters, "bf16", ranks_here=8, world_size=8)


def test_offloaded_parameters_take_more_than_the_optimizer_alone() -> None:
    num_parameters = int(psutil.virtual_memory().available / 17)

    require_host_memory("optimizer", num_parameters, "fp32", ranks_here=1, world_size=1)
    with pytest.raises(BackendError):
        require_host_memory("parameters", num_parameters, "fp32", ranks_here=1, world_size=1)


def test_without_offload_no_host_memory_is_required() -> None:
    require_host_memory("none", 10**15, "bf16", ranks_here=1, world_size=1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cpu_supports_every_precision(precision: str) -> None:
    require_precision(precision, CPU)


def test_a_cpu_has_no_known_peak() -> None:
    assert device_peak_flops(CPU, "bf16") is None
