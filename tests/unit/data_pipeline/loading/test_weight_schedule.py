"""Weights over training as changes of a mixture, and limits that no data set exceeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.mixture import Change, Mixture
from data_pipeline.loading.weight_schedule import (
    STAIRS,
    Limit,
    Weight,
    changes_of,
    limited,
    mean_shares,
    moment_without_data,
    peak_shares,
)

NUM_ROWS = 2000


def weight(is_linear: bool = False, **points: float) -> Weight:
    """Weight by points such as `at0=3, at80=1`, in percent of training."""
    pairs = tuple((int(at.removeprefix("at")) / 100, value) for at, value in points.items())
    return Weight(pairs, is_linear)


def row_of(fraction: float) -> int:
    return round(fraction * NUM_ROWS)


def test_a_step_keeps_its_weight_until_the_next_position() -> None:
    steps = [weight(at0=3, at80=1), weight(at0=0, at50=2)]
    assert changes_of(steps, row_of) == [
        Change(0, (3, 0)),
        Change(1000, (3, 2)),
        Change(1600, (1, 2)),
    ]
    assert (steps[0].before(0.8), steps[0].after(0.8)) == (3, 1)


def test_a_line_is_a_staircase_through_its_middle() -> None:
    changes = changes_of([weight(True, at0=0, at50=2), weight(at0=1)], row_of)
    assert len(changes) == STAIRS + 1
    assert changes[-1] == Change(1000, (2, 1))
    for stair, change in enumerate(changes[:-1]):
        assert change.first_row == 1000 * stair // STAIRS
        assert change.weights == pytest.approx((2 * (stair + 0.5) / STAIRS, 1))


def test_a_short_training_has_at_most_a_stair_per_row() -> None:
    changes = changes_of([weight(True, at0=4, at100=0), weight(at0=1)], lambda at: round(at * 3))
    assert [change.first_row for change in changes] == [0, 1, 2, 3]


def test_shares_of_a_line_are_its_integral() -> None:
    line = [weight(True, at0=0, at100=1), weight(True, at0=1, at100=0)]
    assert mean_shares(line) == pytest.approx([0.5, 0.5], abs=1e-6)
    assert peak_shares(line) == [1, 1]
    # From 0 to 1 of x / (1 + x): 1 - log(2).
    hyperbola = mean_shares([weight(True, at0=0, at100=1), weight(at0=1)])
    assert hyperbola[0] == pytest.approx(1 - np.log(2), abs=1e-5)


def test_a_time_without_data_is_found() -> None:
    late = [weight(at0=1, at30=0), weight(at0=0, at40=1)]
    assert moment_without_data(late) == 0.3
    assert moment_without_data([weight(True, at0=1, at100=0)], end=1) is None
    assert moment_without_data([weight(True, at0=1, at50=0)], end=1) == 0.5


def test_a_dropped_data_set_leaves_its_rows_to_the_others() -> None:
    found = limited([Change(0, (1, 1, 2))], [Limit(100, ends_run=False), None, None], 4000)
    counts = found.mixture.counts(4000)
    assert (counts[0], found.end) == (100, None)
    row = found.dropped[0]
    assert found.mixture.shares_at(row - 1) == [0.25, 0.25, 0.5]
    assert found.mixture.shares_at(row)[1] == pytest.approx(1 / 3, abs=1e-5)
    assert sum(counts) == 4000
    before = Mixture([1, 1, 2]).deal(np.arange(row))
    for ours, others in zip(found.mixture.deal(np.arange(row)), before, strict=True):
        assert ours.tolist() == others.tolist()


def test_a_limit_that_ends_the_run_is_the_last_row() -> None:
    limits = [Limit(100, ends_run=True), Limit(500, ends_run=False)]
    found = limited([Change(0, (1, 1))], limits, NUM_ROWS)
    assert found.end is not None
    end, data_set = found.end
    assert data_set == 0
    assert found.mixture.counts(end)[0] == 100
    assert found.mixture.counts(end + 1)[0] == 101


def test_the_run_ends_when_every_data_set_is_dropped_or_not_yet_begun() -> None:
    limits = [Limit(30, ends_run=False), Limit(50, ends_run=False), None]
    found = limited([Change(0, (1, 1, 0)), Change(1000, (1, 1, 1))], limits, NUM_ROWS)
    assert found.end == (80, 1)
    assert found.mixture.counts(80) == [30, 50, 0]


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    far = [Limit(10**15, ends_run=True), Limit(101, ends_run=True)]
    found = limited([Change(0, (1e-9, 1))], [far[0], None], 10**12)
    assert (found.dropped, found.end) == ({}, None)
    assert limited([Change(0, (1, 1))], [None, far[1]], 202).end is None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_data_set_exceeds_its_limit_and_none_is_dropped_before(data: st.DataObject) -> None:
    num_data_sets = data.draw(st.integers(1, 4))
    values = st.lists(
        st.sampled_from([0.0, 1.0, 2.5]), min_size=num_data_sets, max_size=num_data_sets
    ).filter(any)
    rows = sorted(data.draw(st.sets(st.integers(1, 900), max_size=4)))
    changes = [Change(row, tuple(data.draw(values))) for row in [0, *rows]]
    limit = st.none() | st.builds(Limit, st.integers(1, 300), st.booleans())
    limits = [data.draw(limit) for _ in range(num_data_sets)]
    found = limited(changes, limits, NUM_ROWS)
    stop = NUM_ROWS if found.end is None else found.end[0]
    assert stop <= NUM_ROWS
    counts = found.mixture.counts(stop)
    assert sum(counts) == stop
    for number, (count, of_data_set) in enumerate(zip(counts, limits, strict=True)):
        if of_data_set is not None:
            assert count <= of_data_set.rows
        if found.dropped.get(number, stop) < stop:
            assert of_data_set is not None
            assert count == of_data_set.rows
            assert found.mixture.shares_at(stop)[number] == 0
