"""Mixtures: every row of every data set in order, in the requested shares, at any position."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.loading.mixture import Mixture

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # an overflow

WEIGHTS = st.lists(
    st.one_of(st.floats(0.01, 100), st.integers(1, 1000), st.just(1.0)), min_size=1, max_size=6
)
PLACES = st.one_of(st.integers(0, 3000), st.integers(0, 10**15))
MODERATELY = settings(max_examples=60, deadline=None)


def stretch(start: int, num_rows: int = 500) -> np.ndarray:
    return np.arange(start, start + num_rows, dtype=np.int64)


@MODERATELY
@given(weights=WEIGHTS, start=PLACES)
def test_number_of_inverts_deal(weights: list[float], start: int) -> None:
    mixture, numbers = Mixture(weights), stretch(start)
    data_set, row = mixture.deal(numbers)
    for index in range(len(weights)):
        is_mine = data_set == index
        assert mixture.number_of(index, row[is_mine]).tolist() == numbers[is_mine].tolist()


@MODERATELY
@given(weights=WEIGHTS, start=PLACES, data=st.data())
def test_deal_inverts_number_of(weights: list[float], start: int, data: st.DataObject) -> None:
    mixture, rows = Mixture(weights), stretch(start)
    index = data.draw(st.integers(0, len(weights) - 1))
    data_set, row = mixture.deal(mixture.number_of(index, rows))
    assert set(data_set.tolist()) == {index}
    assert row.tolist() == rows.tolist()


@MODERATELY
@given(weights=WEIGHTS)
def test_the_rows_of_every_data_set_are_dealt_in_order(
    weights: list[float],
) -> None:
    data_set, row = Mixture(weights).deal(stretch(0, 3000))
    for index in range(len(weights)):
        found = row[data_set == index].tolist()
        assert found == list(range(len(found)))


@MODERATELY
@given(weights=WEIGHTS, start=PLACES)
def test_no_row_of_a_data_set_is_skipped(weights: list[float], start: int) -> None:
    data_set, row = Mixture(weights).deal(stretch(start, 3000))
    for index in range(len(weights)):
        assert set(np.diff(row[data_set == index]).tolist()) <= {1}


@MODERATELY
@given(weights=WEIGHTS, start=PLACES, num_rows=st.integers(1, 3000))
def test_any_range_has_each_share_within_one_row_per_data_set(
    weights: list[float], start: int, num_rows: int
) -> None:
    mixture = Mixture(weights)
    data_set, _ = mixture.deal(stretch(start, num_rows))
    counts = np.bincount(data_set, minlength=len(weights))
    excess = counts - num_rows * np.array(mixture.shares)
    assert np.abs(excess).max() <= len(weights) + 1e-6


@MODERATELY
@given(weights=WEIGHTS)
def test_shares_are_the_weights_to_a_millionth(weights: list[float]) -> None:
    shares = Mixture(weights).shares
    expected = [weight / sum(weights) for weight in weights]
    assert math.isclose(sum(shares), 1)
    assert np.abs(np.array(shares) - expected).max() < 4e-6


@MODERATELY
@given(weights=WEIGHTS, starts=st.lists(PLACES, min_size=1, max_size=5))
def test_rows_are_dealt_independently_of_each_other(
    weights: list[float], starts: list[int]
) -> None:
    mixture = Mixture(weights)
    numbers = np.stack([stretch(start, 20) for start in starts])
    data_set, row = mixture.deal(numbers)
    for at, number in np.ndenumerate(numbers):
        alone = Mixture(weights).deal(np.array([number]))
        assert (data_set[at], row[at]) == (alone[0][0], alone[1][0])


@given(weight=st.floats(1e-9, 1e9), start=PLACES)
def test_a_single_data_set_is_dealt_every_row(weight: float, start: int) -> None:
    data_set, row = Mixture([weight]).deal(stretch(start))
    assert set(data_set.tolist()) == {0}
    assert row.tolist() == stretch(start).tolist()


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=4), factor=st.integers(-9, 9))
def test_only_the_proportion_of_weights_matters(weights: list[float], factor: int) -> None:
    scaled = [weight * 2.0**factor for weight in weights]
    assert Mixture(scaled).shares == Mixture(weights).shares


def test_the_largest_weights_have_their_shares() -> None:
    shares = Mixture([1.5e308, 0.5e308]).shares
    assert shares == [0.75, 0.25]


def test_equal_weights_take_turns() -> None:
    data_set, _ = Mixture([1, 1]).deal(stretch(0, 100))
    assert set(np.diff(data_set[::2]).tolist()) == {0}
    assert set((data_set[::2] + data_set[1::2]).tolist()) == {1}


def test_rows_are_dealt_as_recorded() -> None:
    """Recorded values: a change here changes the data of every run with a mixture."""
    data_set, row = Mixture([0.6, 0.3, 0.1]).deal(stretch(10**12, 12))
    found = list(zip(data_set.tolist(), row.tolist(), strict=True))
    assert found == [
        (0, 599999809265),
        (0, 599999809266),
        (1, 299999904633),
        (0, 599999809267),
        (2, 100000286102),
        (0, 599999809268),
        (0, 599999809269),
        (1, 299999904634),
        (0, 599999809270),
        (1, 299999904635),
        (0, 599999809271),
        (0, 599999809272),
    ]


@pytest.mark.parametrize("weight", [0, -1, -1e-9, float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_above_0_is_refused_and_shown(weight: float) -> None:
    with pytest.raises(ConfigError, match=str(weight)):
        Mixture([1.0, weight])


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ConfigError):
        Mixture([])
