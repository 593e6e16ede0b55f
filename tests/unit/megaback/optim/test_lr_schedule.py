"""The learning rate is a pure function of the step."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megaback.config import OptimizerSection
from megaback.optim.lr_schedule import rate_factor_at

runs = st.tuples(
    st.integers(1, 2000),  # steps of the run
    st.integers(0, 300),  # steps of warmup
    st.floats(0, 1),  # ratio at the end
)


def section(warmup_steps: int = 0, ratio: float = 0.1, **changes: Any) -> OptimizerSection:
    return OptimizerSection(
        learning_rate=3e-4, warmup_steps=warmup_steps, final_learning_rate_ratio=ratio, **changes
    )


@given(run=runs, share=st.floats(0, 1))
def test_warmup_is_linear_from_zero_to_the_peak(run: tuple[int, int, float], share: float) -> None:
    total_steps, warmup_steps, ratio = run
    assume(warmup_steps > 0)
    step = min(int(share * warmup_steps), warmup_steps - 1)

    rate = rate_factor_at(step, total_steps, section(warmup_steps, ratio))

    assert rate == pytest.approx((step + 1) / warmup_steps)


@given(run=runs)
def test_the_peak_is_reached_when_warmup_ends(run: tuple[int, int, float]) -> None:
    total_steps, warmup_steps, ratio = run

    assert rate_factor_at(warmup_steps, total_steps, section(warmup_steps, ratio)) == pytest.approx(
        1
    )


@given(run=runs)
def test_after_the_peak_the_rate_never_rises(run: tuple[int, int, float]) -> None:
    total_steps, warmup_steps, ratio = run
    rates = [
        rate_factor_at(step, total_steps, section(warmup_steps, ratio))
        for step in range(warmup_steps, total_steps)
    ]

    assert all(later <= earlier for earlier, later in pairwise(rates))


@given(run=runs)
def test_the_last_step_has_the_final_ratio_of_the_peak(run: tuple[int, int, float]) -> None:
    total_steps, warmup_steps, ratio = run
    assume(total_steps >= warmup_steps + 2)

    rate = rate_factor_at(total_steps - 1, total_steps, section(warmup_steps, ratio))

    assert rate == pytest.approx(ratio, abs=1e-12)


@given(run=runs, beyond=st.integers(0, 100))
def test_past_the_end_the_rate_stays_at_the_final_ratio(
    run: tuple[int, int, float], beyond: int
) -> None:
    total_steps, warmup_steps, ratio = run
    assume(total_steps >= warmup_steps + 2)

    rate = rate_factor_at(total_steps + beyond, total_steps, section(warmup_steps, ratio))

    assert rate == pytest.approx(ratio, abs=1e-12)


@given(run=runs, step=st.integers(0, 3000))
def test_the_factor_is_always_between_0_and_1(run: tuple[int, int, float], step: int) -> None:
    total_steps, warmup_steps, ratio = run

    assert 0 <= rate_factor_at(step, total_steps, section(warmup_steps, ratio)) <= 1


def test_halfway_through_the_cosine_the_rate_is_halfway_between_peak_and_end() -> None:
    assert rate_factor_at(15, 21, section(10)) == pytest.approx((1 + 0.1) / 2)


@given(run=runs, decay=st.floats(0.01, 1), schedule=st.sampled_from(["wsd", "linear"]))
def test_every_schedule_begins_at_the_peak_never_rises_and_ends_at_the_final_ratio(
    run: tuple[int, int, float], decay: float, schedule: str
) -> None:
    total_steps, warmup_steps, ratio = run
    assume(total_steps >= warmup_steps + 2)
    numbers = section(warmup_steps, ratio, schedule=schedule, decay_fraction=decay)
    rates = [
        rate_factor_at(step, total_steps, numbers) for step in range(warmup_steps, total_steps)
    ]

    assert rates[0] == pytest.approx(1)
    assert rates[-1] == pytest.approx(ratio, abs=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(rates))


def test_wsd_stays_at_the_peak_until_its_decay_phase() -> None:
    numbers = section(10, 0.0, schedule="wsd", decay_fraction=0.2)
    rates = [rate_factor_at(step, 101, numbers) for step in range(101)]

    assert rates[10:81] == [1] * 71
    assert rates[90] == pytest.approx(0.5)


def test_the_linear_schedule_decays_linearly_from_the_peak() -> None:
    numbers = section(0, 0.2, schedule="linear")

    assert rate_factor_at(25, 101, numbers) == pytest.approx(1 - 0.8 / 4)


def test_the_rate_of_a_step_does_not_depend_on_earlier_calls() -> None:
    steps = [7, 3, 90, 7, 3]

    rates = [rate_factor_at(step, 100, section(10)) for step in steps]

    assert rates[:2] == rates[3:]


def test_a_run_of_one_step_is_at_the_peak() -> None:
    assert rate_factor_at(0, 1, section()) == pytest.approx(1)
    assert math.isfinite(rate_factor_at(0, 1, section(1)))
