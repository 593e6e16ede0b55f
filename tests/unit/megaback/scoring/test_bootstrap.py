"""Bootstrap intervals agree with the known errors of means and ratios."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.scoring.bootstrap import mean_interval, ratio_interval


def test_the_width_of_an_interval_matches_the_standard_error() -> None:
    values = np.random.default_rng(3).random(4000) < 0.3
    interval = mean_interval(values.astype(float))
    error = np.sqrt(0.3 * 0.7 / 4000)
    assert interval.value == values.mean()
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_a_ratio_weights_rows_by_length() -> None:
    interval = ratio_interval([1.0, 30.0], [1.0, 10.0])
    assert interval.value == 31 / 11
    assert (interval.low, interval.high) == (1.0, 3.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20), st.integers(0, 5))
def test_the_interval_contains_the_value_and_depends_on_the_seed_alone(
    values: list[float], seed: int
) -> None:
    interval = mean_interval(values, seed)
    assert interval.low is not None
    assert interval.high is not None
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert interval == mean_interval(values, seed)


def test_one_row_has_a_value_and_no_interval() -> None:
    interval = ratio_interval([3.0], [2.0]).scaled(2.0)
    assert interval.to_dict() == {"value": 3.0, "low": None, "high": None}
    assert interval.between == "-"
    assert mean_interval([1.0, 1.0]).between == "1.000 to 1.000"
