"""What a tracker is given: lines of metrics.jsonl as flat values of a step."""

from collections.abc import Mapping
from typing import Any, Protocol

Value = float | str
BEFORE_ALL_STEPS = -1
"""Measurements before the first step are of step 0."""


class Tracker(Protocol):
    """Where numbers go besides metrics.jsonl. Any exception means that it has failed."""

    held_step: int
    """Last step that it holds from earlier starts: only later steps are written to it."""

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Take what a line of metrics.jsonl says of a step; steps never go down."""

    def close(self) -> None:
        """Bring everything to where it belongs."""


def flat_values(line: Mapping[str, Any], before: str = "") -> dict[str, Value]:
    """What a line says but its step: nested keys are joined by `/`, what is unknown is left out."""
    flat: dict[str, Value] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= flat_values(value, f"{before}{key}/")
        elif value is not None and (before or key != "step"):
            flat[before + key] = value
    return flat
