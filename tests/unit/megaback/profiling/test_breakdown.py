"""Time by part, from a real profile on a CPU, and the idle share of a GPU's made-up kernels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megaback.profiling.breakdown import idle_share, time_by_part


def test_operations_belong_to_the_phase_in_which_they_start() -> None:
    left = torch.randn(256, 256, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function("megaback:forward"):
                total = (left @ left).sum()
            with record_function("megaback:backward"):
                total.backward()  # type: ignore[no-untyped-call]
            left.detach().mul(2)

    rows = time_by_part(profiler.events(), 2)  # type: ignore[no-untyped-call]

    times = {(row.phase, row.part): row.cpu_s for row in rows}
    assert times["forward", "matrix products"] > 0
    assert times["backward", "matrix products"] > 0
    assert ("between", "elementwise") in times
    assert ("between", "matrix products") not in times
    assert all(row.device_s == 0 for row in rows)
    phases = [row.phase for row in rows]
    assert phases == sorted(phases, key=["forward", "backward", "between"].index)


def event(name: str, start: float, end: float, device: str = "CPU", **values: Any) -> Any:
    usual = {
        "name": name,
        "device_type": SimpleNamespace(name=device),
        "time_range": SimpleNamespace(start=start, end=end),
        "self_cpu_time_total": end - start,
        "kernels": [],
        "cpu_parent": None,
    }
    return SimpleNamespace(**(usual | values))


def test_kernels_count_for_the_phase_that_launched_them() -> None:
    kernel = SimpleNamespace(name="nvjet_gemm", duration=3000.0)
    loss = event("_ChunkedLoss", 0, 5)
    events = [
        event("megaback:forward", 0, 100, self_cpu_time_total=0),
        event("aten::mm", 1, 5, kernels=[kernel], cpu_parent=loss),
        event("aten::linear", 10, 30, kernels=[kernel]),
        event("nvjet_gemm", 200, 3200, "CUDA"),
    ]

    times = {(row.phase, row.part): row.device_s for row in time_by_part(events, 1)}

    assert times["forward", "head and loss"] == pytest.approx(0.003)
    assert times["forward", "matrix products"] == pytest.approx(0.003)
    assert sum(times.values()) == pytest.approx(0.006)


def test_overlapping_kernels_are_busy_once() -> None:
    kernels = [(0, 200), (100, 300), (150, 160), (600, 800)]
    events = [event("kernel", start, end, "CUDA") for start, end in kernels]

    assert idle_share(events, 1e-3) == pytest.approx(0.5)
    assert idle_share([event("aten::mm", 0, 5)], 1e-3) is None
