"""Duration of a rank's own forward passes, which finds the rank that the others wait for.

Collectives make the steps of all ranks equally long. Forward passes have no collectives at ZeRO 0
to 2; at stage 3 the rank waits in them for weights, and these waits are subtracted. On a GPU,
durations are those of its stream, read a step later, when the host has waited for it anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from time import monotonic
from typing import Any

import torch

_RANKS = 1 << 20
_UNIT_S = 1e-6
"""Durations are exact to a microsecond beside a rank: together they fit a float64."""


class ForwardTime:
    """Durations of the forward passes of the step before, on this rank."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        """At ZeRO 3, the engine's waits for weights are measured too."""
        self._device = device
        self._passes: list[Callable[[], float]] = []
        self._is_within = False
        if engine.zero_optimization_stage() == 3:
            self._measure_fetches(engine.optimizer.parameter_offload.get_param_coordinator())

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Context of a forward pass."""
        with self._measured(1):
            self._is_within = True
            try:
                yield
            finally:
                self._is_within = False

    def take_s(self) -> float:
        """Duration since the last call, in seconds. The work of that time must be done."""
        passes, self._passes = self._passes, []
        return sum(duration_s() for duration_s in passes)

    def _measure_fetches(self, coordinator: Any) -> None:
        fetch = coordinator.fetch_sub_module

        @wraps(fetch)
        def measured(*arguments: Any, **options: Any) -> Any:
            if not self._is_within:  # backward, or validation
                return fetch(*arguments, **options)
            with self._measured(-1):
                return fetch(*arguments, **options)

        coordinator.fetch_sub_module = measured

    @contextmanager
    def _measured(self, sign: int) -> Iterator[None]:
        """Add the duration of the block, or subtract it."""
        if self._device.type == "cpu":
            started = monotonic()
            yield
            duration_s = sign * (monotonic() - started)
            self._passes.append(lambda: duration_s)
            return
        first, last = self._event(), self._event()
        stream = torch.accelerator.current_stream(self._device)
        first.record(stream)
        yield
        last.record(stream)
        self._passes.append(lambda: sign * first.elapsed_time(last) / 1e3)

    def _event(self) -> torch.Event:
        return torch.Event(self._device, enable_timing=True)


def with_rank(duration_s: float, rank: int) -> float:
    """A duration and its rank in one number: the largest one is of the slowest rank."""
    return float(round(max(duration_s, 0.0) / _UNIT_S) * _RANKS + rank)


def without_rank(number: float) -> tuple[float, int]:
    """The duration in seconds, and its rank, of a number made by `with_rank`."""
    units, rank = divmod(int(number), _RANKS)
    return units * _UNIT_S, rank
