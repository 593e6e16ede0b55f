"""The step guard skips harmful steps, and decides alike before and after an interruption."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import NonFiniteError, RunMismatchError
from megaback.config_operation import GuardSection
from megaback.faults.step_guard import (
    StepGuard,
    read_excluded_steps,
    with_range,
    write_skipped_steps,
)
from megaback.run_folder import SKIPPED_STEPS_NAME

Step = tuple[float, float]
"""A loss and a gradient norm."""
NON_FINITE = [math.nan, math.inf, -math.inf]
REASON = "some reason"


def make_guard(earlier: Sequence[dict[str, Any]] = (), /, **options: object) -> StepGuard:
    """A guard with a window of three steps; spikes are 1 nat, or 10 times the norm."""
    fields = {"spike_nats": 1.0, "spike_norm_ratio": 10.0, "window_steps": 3, **options}
    return StepGuard(GuardSection.model_validate(fields), earlier)


def update(guard: StepGuard, *steps: Step) -> None:
    for number, (loss, norm) in enumerate(steps):
        guard.record(number + 1, loss, norm, None)


def after(*steps: Step, **options: object) -> StepGuard:
    """A guard that recorded updates with these losses and norms."""
    guard = make_guard(**options)
    update(guard, *steps)
    return guard


def line_of(number: int, step: Step, reason: str | None) -> dict[str, Any]:
    """A step's line of the metrics, where non-finite values are null."""
    loss, norm = (value if math.isfinite(value) else None for value in step)
    line = {"step": number, "loss": loss, "gradient_norm": norm}
    return line if reason is None else {**line, "skipped": reason}


def live(guard: StepGuard, steps: Sequence[Step], first: int) -> Iterator[tuple[str | None, bool]]:
    """The verdict on each step, and whether it ended the run (which then resumes)."""
    for number, (loss, norm) in enumerate(steps, first):
        reason = guard.verdict(loss, norm)
        try:
            guard.record(number, loss, norm, reason)
        except NonFiniteError:
            yield reason, True
        else:
            yield reason, False


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("num_updates", [0, 3])
def test_a_step_with_a_non_finite_loss_or_norm_is_skipped(num_updates: int, value: float) -> None:
    guard = after(*[(5.0, 1.0)] * num_updates, spike_nats=None, spike_norm_ratio=None)

    assert guard.verdict(value, 1.0) == guard.verdict(value, None) == f"the loss is {value}"
    assert guard.verdict(5.0, value) == f"the gradient norm is {value}"


def test_a_spike_is_reported_with_the_median_and_the_limit() -> None:
    guard = after(*[(5.0, 1.0)] * 3)

    assert guard.verdict(6.25, 1.0) == "loss 6.2500 exceeds median 5.0000 + spike_nats 1"
    assert guard.verdict(5.0, 12.0) == "gradient norm 12 exceeds median 1 x spike_norm_ratio 10"


def test_values_up_to_the_limit_are_not_spikes() -> None:
    guard = after(*[(5.0, 1.0)] * 3)

    assert guard.verdict(6.0, 10.0) is None
    assert guard.verdict(-100.0, 0.0) is None


@pytest.mark.parametrize("num_updates", range(3))
def test_there_are_no_spikes_before_the_window_is_full(num_updates: int) -> None:
    assert after(*[(5.0, 1.0)] * num_updates).verdict(1e6, 1e6) is None


def test_there_are_no_spikes_without_limits() -> None:
    guard = after(*[(5.0, 1.0)] * 3, spike_nats=None, spike_norm_ratio=None)

    assert guard.verdict(1e6, 1e6) is None


def test_the_loss_is_checked_before_the_norm_is_known() -> None:
    guard = after(*[(5.0, 1.0)] * 3)

    assert guard.verdict(5.0, None) is None
    assert guard.verdict(7.0, None) is not None


def test_limits_are_relative_to_the_median_of_the_window() -> None:
    """An outlier moves neither limit, and steps before the window do not count."""
    guard = after((0.0, 0.0), (5.0, 1.0), (5.0, 1.0), (99.0, 1e6))

    assert guard.verdict(6.0, 10.0) is None
    assert guard.verdict(6.1, 1.0) is not None
    assert guard.verdict(5.0, 10.1) is not None


def test_skipped_steps_do_not_enter_the_median() -> None:
    guard = after(*[(5.0, 1.0)] * 2)
    for number in range(3, 8):
        guard.record(number, 50.0, 100.0, REASON)
    assert guard.verdict(1e6, 1e6) is None  # the window is not full yet

    update(guard, (5.0, 1.0))

    assert guard.verdict(50.0, 1.0) is not None
    assert guard.verdict(5.0, 100.0) is not None


@pytest.mark.parametrize("maximum", [0, 1, 3])
def test_too_many_skipped_steps_in_a_row_end_the_run(maximum: int) -> None:
    guard = make_guard(max_skipped_steps=maximum)
    for number in range(maximum):
        guard.record(number, math.nan, 1.0, REASON)

    with pytest.raises(NonFiniteError, match=rf"step 9: {REASON}, after {maximum} skipped steps"):
        guard.record(9, math.nan, 1.0, REASON)


def test_an_update_ends_a_row_of_skipped_steps() -> None:
    guard = make_guard(max_skipped_steps=1)

    for number in range(0, 20, 2):
        guard.record(number, math.nan, math.nan, REASON)
        guard.record(number + 1, 5.0, 1.0, None)


numbers = st.sampled_from([0.5, 1.0, 5.0, 6.5, 20.0, math.nan, math.inf])
several_steps = st.lists(st.tuples(numbers, numbers), max_size=25)


@given(st.data(), several_steps, st.integers(1, 4), st.integers(0, 3))
def test_a_guard_restored_from_the_metrics_decides_as_the_original(
    data: st.DataObject, steps: list[Step], window_steps: int, max_skipped_steps: int
) -> None:
    options = {"window_steps": window_steps, "max_skipped_steps": max_skipped_steps}
    stop = data.draw(st.integers(0, len(steps)))
    guard = make_guard(**options)
    lines: list[dict[str, Any]] = []
    for number, (reason, _) in enumerate(live(guard, steps[:stop], 1), 1):
        lines.append(line_of(number, steps[number - 1], reason))
        if data.draw(st.booleans()):
            lines.append({"step": number, "val_loss": 99.0})
            lines.append({"step": number, "excluded": True})

    restored = make_guard(json.loads(json.dumps(lines, allow_nan=False)), **options)

    rest = steps[stop:]
    assert list(live(restored, rest, stop + 1)) == list(live(guard, rest, stop + 1))


def test_a_run_without_excluded_steps_has_no_ranges(tmp_path: Path) -> None:
    assert read_excluded_steps(tmp_path) == []


def test_excluded_ranges_read_back_sorted_and_once(tmp_path: Path) -> None:
    for first, last in ((30, 40), (5, 5), (30, 40), (30, 35)):
        write_skipped_steps(tmp_path, with_range(tmp_path, first, last))

    assert read_excluded_steps(tmp_path) == [(5, 5), (30, 35), (30, 40)]


@pytest.mark.parametrize(
    "content", [b"", b"[[1, 2]", b"5", b"null", b"[1]", b"[[1]]", b"[[1, 2, 3]]", b'[["a", 2]]']
)
def test_an_invalid_file_of_ranges_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / SKIPPED_STEPS_NAME
    path.write_bytes(content)

    with pytest.raises(RunMismatchError, match=f"{path} is not a list of pairs of steps"):
        read_excluded_steps(tmp_path)
    with pytest.raises(RunMismatchError):
        write_skipped_steps(tmp_path, with_range(tmp_path, 1, 2))
    assert path.read_bytes() == content
