"""Mixtures: every row of every data set in order, in the requested shares, at any position."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.loading.mixture import NEVER, Change, Mixture

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
def test_any_beginning_has_each_share_within_half_a_row_for_each_other_data_set(
    weights: list[float],
) -> None:
    mixture = Mixture(weights)
    dealt = np.eye(len(weights))[mixture.deal(stretch(0, 3000))[0]]
    due = np.arange(1, 3001)[:, None] * np.array(mixture.shares)
    # A half is rounded to a whole number of parts, of which the smallest weights have 17.
    assert np.abs(np.cumsum(dealt, axis=0) - due).max() <= 0.52 * (len(weights) - 1) + 1e-6


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


@st.composite
def changing(draw: st.DrawFn) -> Mixture:
    """Mixtures of which any weight may be 0 for a time."""
    num_data_sets = draw(st.integers(1, 5))
    weight = st.one_of(st.sampled_from([0.0, 1.0, 3.0]), st.floats(0.01, 100))
    weights = st.lists(weight, min_size=num_data_sets, max_size=num_data_sets).filter(any)
    rows = draw(st.lists(st.integers(1, 2900) | st.integers(1, 30), max_size=8, unique=True))
    changes = [Change(row, tuple(draw(weights))) for row in sorted(rows)]
    return Mixture(draw(weights), changes)


@MODERATELY
@given(mixture=changing(), num_rows=st.integers(0, 3000))
def test_any_beginning_has_the_shares_of_its_time_within_about_half_a_row_per_data_set(
    mixture: Mixture, num_rows: int
) -> None:
    data_set, row = mixture.deal(stretch(0, 3000))
    shares = np.array([mixture.shares_at(number) for number in range(3000)])
    dealt = np.eye(shares.shape[1])[data_set]
    assert not dealt[shares == 0].any()
    excess = np.abs(np.cumsum(dealt, axis=0) - np.cumsum(shares, axis=0)).max()
    assert excess <= (shares.shape[1] + 1) / 2
    assert mixture.counts(num_rows) == dealt[:num_rows].sum(axis=0).tolist()
    for index in range(shares.shape[1]):
        found = np.flatnonzero(data_set == index)
        assert row[found].tolist() == list(range(len(found)))
        assert mixture.number_of(index, row[found]).tolist() == found.tolist()


@MODERATELY
@given(mixture=changing(), start=PLACES)
def test_the_deal_after_the_last_change_is_inverted_anywhere(mixture: Mixture, start: int) -> None:
    numbers = stretch(start)
    data_set, row = mixture.deal(numbers)
    for index in set(data_set.tolist()):
        mine = data_set == index
        assert mixture.number_of(index, row[mine]).tolist() == numbers[mine].tolist()


def test_rows_before_a_change_are_those_of_the_mixture_without_it() -> None:
    changed = Mixture([3, 1, 2], [Change(777, (0, 1, 1))])
    for found, expected in zip(
        changed.deal(stretch(0, 777)), Mixture([3, 1, 2]).deal(stretch(0, 777)), strict=True
    ):
        assert found.tolist() == expected.tolist()


def test_errors_of_rounding_do_not_add_up_over_many_changes() -> None:
    changes = [Change(7 * n, (1.0, (1, 3)[n % 2])) for n in range(1, 20_000)]
    counts = Mixture([1, 1], changes).counts(140_000)
    assert counts[0] == pytest.approx(140_000 * (1 / 2 + 1 / 4) / 2, abs=1)


@pytest.mark.parametrize("num_data_sets", [3, 5, 30])
def test_errors_of_many_data_sets_do_not_add_up_over_changes_of_all_weights(
    num_data_sets: int,
) -> None:
    generator = np.random.default_rng(num_data_sets)
    weights = generator.exponential(size=(500, num_data_sets))
    changes = [Change(11 * n, tuple(of_change)) for n, of_change in enumerate(weights.tolist())]
    mixture = Mixture(changes[0].weights, changes[1:])
    due = np.zeros(num_data_sets)
    for change in changes:
        counts = mixture.counts(change.first_row)
        assert sum(counts) == change.first_row
        assert np.abs(counts - due).max() <= min((num_data_sets + 1) / 2, 5)
        due += 11 * np.array(mixture.shares_at(change.first_row))


def test_a_row_of_a_data_set_whose_weight_stays_0_is_never_dealt() -> None:
    mixture = Mixture([1, 1], [Change(10, (1, 0))])
    assert mixture.number_of(1, np.array([4, 5, 6])).tolist() == [9, NEVER, NEVER]


def test_changed_weights_are_dealt_as_recorded() -> None:
    """Recorded values: a change here changes the data of every run with changing weights."""
    mixture = Mixture([0.6, 0.3, 0.1], [Change(7, (0, 0.5, 1)), Change(13, (1, 1, 0.3))])
    data_set, row = mixture.deal(stretch(0, 24))
    assert "".join(map(str, data_set.tolist())) == "0102001" + "212212" + "01011020101"
    rows = [0, 0, 1, 0, 2, 3, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6, 5, 7, 7, 8, 8]
    assert row.tolist() == rows


@pytest.mark.parametrize("weight", [-1, -1e-9, float("inf"), float("-inf"), float("nan")])
def test_a_negative_or_infinite_weight_is_refused_and_shown(weight: float) -> None:
    with pytest.raises(ConfigError, match=str(weight)):
        Mixture([1.0, weight])


@pytest.mark.parametrize("weights", [[], [0], [0, 0.0]])
def test_a_mixture_of_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError):
        Mixture(weights)
