"""Step guard: skips updates with a non-finite or spiking loss or gradient norm, and excluded steps.

All ranks see the same loss and norm, so all decide alike. The window of earlier steps is read back
from the metrics, so that a resumed run decides as one that was never stopped.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.common.atomic import replacing
from data_pipeline.common.regular_files import UNFIT, read_file
from data_pipeline.errors import NonFiniteError, RunMismatchError
from megaback.config_operation import GuardSection
from megaback.run_folder import MAX_SKIPPED_STEPS_BYTES, SKIPPED_STEPS_NAME

_RANGES = TypeAdapter(list[tuple[int, int]])


_GUARDED_FIELDS = ("loss", "gradient_norm", "skipped")


def guarded_steps(
    metrics: Sequence[dict[str, Any]], step: int, window_steps: int
) -> list[dict[str, Any]]:
    """Fields of a run's metrics, up to a step, that a guard compares with."""
    earlier: list[dict[str, Any]] = []
    num_updates = 0
    for line in reversed(metrics):
        if "loss" in line and line["step"] <= step:
            earlier.append({name: line[name] for name in _GUARDED_FIELDS if name in line})
            num_updates += "skipped" not in line
            if num_updates == window_steps:
                break
    return earlier[::-1]


class StepGuard:
    """Decides by its loss and gradient norm whether a step is skipped."""

    def __init__(self, section: GuardSection, earlier: Iterable[dict[str, Any]]) -> None:
        """`earlier`: lines of the run's metrics, up to the resumed step."""
        self._section = section
        self._norms: deque[float] = deque(maxlen=section.window_steps)
        self._losses: deque[float] = deque(maxlen=section.window_steps)
        self._num_skipped = 0  # in a row
        for line in earlier:
            if "loss" in line:
                self._remember(line["loss"], line.get("gradient_norm"), "skipped" in line)

    def verdict(self, loss: float, gradient_norm: float | None) -> str | None:
        """Reason to skip a step, or None. `gradient_norm` may not be known yet."""
        section = self._section
        for what, value in (("loss", loss), ("gradient norm", gradient_norm)):
            if value is not None and not math.isfinite(value):
                return f"the {what} is {value}"
        if len(self._norms) < section.window_steps:
            return None  # too early for a median
        if section.spike_nats is not None:
            median = statistics.median(self._losses)
            if loss > median + section.spike_nats:
                limit = f"spike_nats {section.spike_nats:g}"
                return f"loss {loss:.4f} exceeds median {median:.4f} + {limit}"
        if section.spike_norm_ratio is not None and gradient_norm is not None:
            median = statistics.median(self._norms)
            if gradient_norm > median * section.spike_norm_ratio:
                limit = f"spike_norm_ratio {section.spike_norm_ratio:g}"
                return f"gradient norm {gradient_norm:.3g} exceeds median {median:.3g} x {limit}"
        return None

    def record(self, step: int, loss: float, gradient_norm: float, reason: str | None) -> None:
        """Record a step. Raises NonFiniteError after too many skipped steps in a row."""
        self._remember(loss, gradient_norm, reason is not None)
        if self._num_skipped > self._section.max_skipped_steps:
            raise NonFiniteError(
                f"step {step}: {reason}, after {self._section.max_skipped_steps} skipped steps in "
                "a row; the checkpoints before them are intact: lower optimizer.learning_rate, or "
                "inspect the data of these steps and skip them with `megaback rollback RUN "
                "--steps N`"
            )

    def _remember(self, loss: float | None, gradient_norm: float | None, is_skipped: bool) -> None:
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        if not is_skipped and loss is not None and gradient_norm is not None:
            self._losses.append(loss)
            self._norms.append(gradient_norm)


def require_updates(num_updates: int, steps: int) -> None:
    """Raises NonFiniteError for a run at its end if it has skipped every step."""
    if not num_updates:
        raise NonFiniteError(
            f"all steps ({steps:,}) were skipped, so nothing was learned: the weights are those "
            "before the first step; see `skipped` in metrics.jsonl for the reasons, and lower "
            "optimizer.learning_rate or inspect the data"
        )


def read_excluded_steps(run: Path) -> list[tuple[int, int]]:
    """Ranges of steps that rollbacks excluded, first and last. Raises RunMismatchError."""
    path = run / SKIPPED_STEPS_NAME
    if not path.exists():
        return []
    try:
        return _parse(read_file(path, MAX_SKIPPED_STEPS_BYTES), str(path))
    except OSError as error:
        if error.errno not in UNFIT:
            raise
        raise RunMismatchError(f"{path} cannot be read: {error.strerror}; remove it") from None


def with_range(run: Path, first: int, last: int) -> bytes:
    """Contents of a run's file of skipped steps with one more range."""
    return _to_json({*read_excluded_steps(run), (first, last)})


def write_skipped_steps(run: Path, contents: bytes) -> None:
    """Write a run's file of skipped steps."""
    with replacing(run / SKIPPED_STEPS_NAME) as file:
        file.write(contents)


def merge_skipped_steps(run: Path, contents: bytes, place: str) -> None:
    """Add the ranges of another copy of the file, in `place`. Raises RunMismatchError."""
    ranges = _parse(contents, f"{SKIPPED_STEPS_NAME} in {place}")
    write_skipped_steps(run, _to_json({*read_excluded_steps(run), *ranges}))


def _parse(contents: bytes, name: str) -> list[tuple[int, int]]:
    try:
        ranges: list[tuple[int, int]] = _RANGES.validate_json(contents)
        return ranges
    except ValueError as error:
        raise RunMismatchError(
            f"{name} is not a list of pairs of steps ({error}); fix it, or remove it to train on "
            "all steps"
        ) from None


def _to_json(ranges: set[tuple[int, int]]) -> bytes:
    return f"{json.dumps(sorted(ranges))}\n".encode()
