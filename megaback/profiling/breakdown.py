"""Time of each part of the profiled steps, from the events of PyTorch's profiler."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from typing import Any

from megaback.profiling.parts import LOSS, OTHER, part_of
from megaback.profiling.report import PHASES, PartTime

ANNOTATION = "megaback:"
"""Prefix of the annotations of phases and of communication."""
_BETWEEN = PHASES[-1]


def time_by_part(events: Iterable[Any], steps: int) -> tuple[PartTime, ...]:
    """Time per step of each part of each phase, in the order of the phases, longest first.

    `events` are PyTorch's FunctionEvents. An operation belongs to the phase in which it starts, on
    any thread: a backward pass runs on threads of its own.
    """
    operations = [event for event in events if event.device_type.name == "CPU"]
    phase_at = _Phases(operations)
    cpu_us: Counter[tuple[str, str]] = Counter()
    device_us: Counter[tuple[str, str]] = Counter()
    for event in operations:
        phase = phase_at(event.time_range.start)
        part = LOSS if _is_within(event, "ChunkedLoss") else part_of(event.name)
        cpu_us[phase, part] += event.self_cpu_time_total
        for kernel in event.kernels:
            device_us[phase, part_of(kernel.name) if part == OTHER else part] += kernel.duration
    rows = [
        PartTime(
            phase=phase,
            part=part,
            cpu_s=cpu_us[phase, part] / steps / 1e6,
            device_s=device_us[phase, part] / steps / 1e6,
        )
        for phase, part in cpu_us.keys() | device_us.keys()
    ]
    return tuple(
        sorted(rows, key=lambda row: (PHASES.index(row.phase), -max(row.device_s, row.cpu_s)))
    )


def idle_share(events: Iterable[Any], duration_s: float) -> float | None:
    """Share of a duration in which no kernel ran on the device; None without kernels."""
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name != "CPU"
    )
    if not ranges:
        return None
    busy_us, until = 0.0, ranges[0][0]
    for start, end in ranges:
        busy_us += max(end - max(start, until), 0)
        until = max(until, end)
    return max(1 - busy_us / 1e6 / duration_s, 0.0)


def _is_within(event: Any, name: str) -> bool:
    """Whether an operation, or one that called it, has such a name."""
    while event is not None:
        if name in event.name:
            return True
        event = event.cpu_parent
    return False


class _Phases:
    """The phase of each moment, from the annotations."""

    def __init__(self, operations: Iterable[Any]) -> None:
        names = {f"{ANNOTATION}{phase}": phase for phase in PHASES}
        self._ranges = sorted(
            (event.time_range.start, event.time_range.end, names[event.name])
            for event in operations
            if event.name in names
        )
        self._starts = [start for start, _, _ in self._ranges]

    def __call__(self, moment: float) -> str:
        number = bisect_right(self._starts, moment) - 1
        if number >= 0:
            _, end, phase = self._ranges[number]
            if moment <= end:
                return phase
        return _BETWEEN
