"""Loss by context: every target is in exactly one bucket."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.tracking.loss_by_context import ContextLoss, bucket_name, bucket_of, num_buckets


def bounds(name: str) -> tuple[int, int]:
    first, _, last = name.partition("-")
    return int(first), int(last or first)


@given(st.integers(1, 1 << 20))
def test_a_context_is_between_the_bounds_of_its_bucket(context: int) -> None:
    bucket = int(bucket_of(np.array([context]))[0])

    first, last = bounds(bucket_name(bucket))
    assert first <= context <= last
    assert bucket < num_buckets(context)


@given(st.integers(2, 20))
def test_buckets_cover_the_whole_context(exponent: int) -> None:
    names = [bucket_name(bucket) for bucket in range(num_buckets(1 << exponent))]

    edges = [bounds(name) for name in names]
    assert edges[0][0] == 1
    assert edges[-1][1] == 1 << exponent
    assert all(after[0] == before[1] + 1 for before, after in pairwise(edges))


def test_the_whole_is_the_mean_over_targets_not_over_buckets() -> None:
    sums_3B = np.array([[6.0, 10.0, 0.0], [1.0, 4.0, 0.0], [0.0, 8.0, 0.0]])

    measured = ContextLoss.of_sums(sums_3B[None])

    assert measured.whole.nats_per_token == pytest.approx(16 / 5)
    assert measured.whole.bits_per_byte == pytest.approx(16 / math.log(2) / 8)
    assert list(measured.by_context) == ["1", "2"]
    assert measured.by_context["1"].bits_per_byte is None
    assert measured.by_context["2"].nats_per_token == pytest.approx(2.5)
    assert measured.by_direction == {}


def test_the_losses_of_two_directions_are_apart_and_the_whole_is_of_both() -> None:
    sums_D3B = np.array(
        [[[6.0, 0.0], [2.0, 0.0], [4.0, 0.0]], [[1.0, 4.0], [1.0, 1.0], [8.0, 0.0]]]
    )

    measured = ContextLoss.of_sums(sums_D3B)

    losses = {name: loss.nats_per_token for name, loss in measured.by_direction.items()}
    assert losses == {"backward": 3.0, "forward": 2.5}
    assert measured.whole.nats_per_token == pytest.approx(11 / 4)
    assert measured.by_context["1"].nats_per_token == pytest.approx(7 / 3)
