"""The duration of a rank's own forward passes, without its waits for weights."""

from time import sleep
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megaback.training.forward_time import ForwardTime, with_rank, without_rank

CPU = torch.device("cpu")


class Coordinator:
    """Fetches weights in 50 ms."""

    def fetch_sub_module(self, module: str, *, forward: bool) -> tuple[str, bool]:
        sleep(0.05)
        return module, forward


def engine_at(stage: int, coordinator: Any = None) -> Any:
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    optimizer = SimpleNamespace(parameter_offload=offload)
    return SimpleNamespace(zero_optimization_stage=lambda: stage, optimizer=optimizer)


def test_durations_of_all_forward_passes_are_added() -> None:
    measured = ForwardTime(engine_at(2), CPU)
    for _ in range(2):
        with measured.forward():
            sleep(0.02)

    assert 0.04 <= measured.take_s() < 1
    assert measured.take_s() == 0


def test_waits_for_weights_are_subtracted_in_forward_passes_only() -> None:
    coordinator = Coordinator()
    measured = ForwardTime(engine_at(3, coordinator), CPU)
    with measured.forward():
        sleep(0.02)
        assert coordinator.fetch_sub_module("block", forward=True) == ("block", True)
    coordinator.fetch_sub_module("block", forward=False)

    assert 0.02 <= measured.take_s() < 0.045


@pytest.fixture
def _stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's stream, on which 7 ms pass between two events."""
    moments = iter(range(0, 1000, 7))

    class Event:
        def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
            assert (device.type, enable_timing) == ("cuda", True)

        def record(self, stream: str) -> None:
            assert stream == "the stream"
            self.moment = next(moments)

        def elapsed_time(self, last: "Event") -> float:
            return float(last.moment - self.moment)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _device: "the stream")


@pytest.mark.usefixtures("_stream")
def test_on_a_gpu_its_stream_is_measured_once_its_work_is_done() -> None:
    coordinator = Coordinator()
    measured = ForwardTime(engine_at(3, coordinator), torch.device("cuda", 0))
    with measured.forward():  # from 0 to 21 ms
        coordinator.fetch_sub_module("block", forward=True)  # from 7 to 14 ms

    assert measured.take_s() == pytest.approx(0.014)


durations = st.floats(0, 8000)
ranks = st.integers(0, (1 << 20) - 1)


@given(durations, ranks)
def test_a_duration_and_its_rank_are_recovered(duration_s: float, rank: int) -> None:
    assert without_rank(with_rank(duration_s, rank)) == (pytest.approx(duration_s, abs=1e-6), rank)


@given(durations, ranks, durations, ranks)
def test_the_largest_number_is_of_the_longest_duration(
    one_s: float, one: int, other_s: float, other: int
) -> None:
    if one_s > other_s + 2e-6:
        assert with_rank(one_s, one) > with_rank(other_s, other)
