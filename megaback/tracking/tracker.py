"""Interface of trackers, which receive lines of metrics.jsonl as flat values of a step."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Value = float | str
BEFORE_ALL_STEPS = -1
"""Measurements before the first step are of step 0."""


class Tracker(Protocol):
    """A destination of metrics besides metrics.jsonl. Any exception means that it has failed."""

    held_step: int
    """Last step that it has from earlier starts: only later steps are written to it."""

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Log the values of one line of metrics.jsonl; steps never decrease."""

    def write_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Log the samples of a validation, given and whole texts, after the step's values."""

    def close(self) -> None:
        """Flush everything and close."""


def flat_values(line: Mapping[str, Any], before: str = "") -> dict[str, Value]:
    """A line's values except its step: nested keys are joined by `/`, None is omitted."""
    flat: dict[str, Value] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{before}{key}/")
        elif value is not None and (before or key != "step"):
            flat[before + key] = value
    return flat
