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


def test_a_large_model_is_measured_by_a_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rate, "_DURATION_S", 0.0)
    monkeypatch.setattr(cpu_rate, "_MAX_FLOPS", 1e6)
    updates: list[None] = []
    monkeypatch.setattr(cpu_rate, "muon_flops", lambda _shape: updates.append(None) or 1e9)
    threads = torch.get_num_threads()

    flops = cpu_rate.measured_flops(shape_of(32, 1, 256), 256, 4096, 64, threads)

    assert 1e4 < flops < 1e13
    assert len(updates) == 1  # asked for once, and not counted
