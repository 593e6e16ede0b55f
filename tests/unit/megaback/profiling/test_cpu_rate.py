"""Rate of steps on a CPU, with a short measurement."""

import pytest
import torch

from megaback.planning.scaling_rules import shape_of
from megaback.profiling import cpu_rate


def test_a_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rate, "_DURATION_S", 0.0)
    threads = torch.get_num_threads()
    try:
        flops = cpu_rate.measured_flops(shape_of(32, 1, 256), 256, 64, 4, threads)
    finally:
        torch.set_num_threads(threads)

    assert 1e6 < flops < 1e13
