"""Training order: every row once per epoch, the same for every world size, at any step."""

import time
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import BatchError, ConfigError
from data_pipeline.loading.order import Indices, Order, choose_lanes, permute, unpermute
from tests.helpers.orders import every_pair, orders, pairs

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # an overflow

A_SMALL_ORDER = Order(
    num_frames=20, rows_per_frame=8, global_batch_rows=12, lanes=4, seed=1, window_frames=3
)


# 15 trillion tokens in frames of 65,536 and rows of 1,024: a billion steps are over 1,000 epochs.
A_LARGE_ORDER = Order(
    num_frames=228_881_836, rows_per_frame=64, global_batch_rows=16_384, lanes=1024, seed=2**32 - 1
)


def epoch_pairs(order: Order, epoch: int) -> list[tuple[int, int]]:
    """(frame, row) of all rows of an epoch, in the order of the steps."""
    first_slot = epoch * order.num_frames // order.lanes
    last_slot = (epoch + 1) * order.num_frames // order.lanes + 1
    rows_per_lane = order.global_batch_rows // order.lanes
    first_step = max(first_slot - 1, 0) * order.rows_per_frame // rows_per_lane
    last_step = (last_slot + 1) * order.rows_per_frame // rows_per_lane + 1
    found = []
    for step in range(first_step, last_step):
        places = order.places(step)
        found += [pair for pair, at in zip(pairs(places), places.epoch, strict=True) if at == epoch]
    return found


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@example(size=1, key=0)
@example(size=2, key=0)
@example(size=4095, key=1)
@example(size=4096, key=1)
@example(size=4097, key=1)
def test_permuting_is_a_bijection(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.int64)
    image = permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@given(exponent=st.integers(0, 12), offset=st.integers(-1, 1), key=st.integers(0, 2**64 - 1))
def test_permuting_is_a_bijection_around_powers_of_two(
    exponent: int, offset: int, key: int
) -> None:
    size = 2**exponent + offset
    assume(size > 0)
    index = np.arange(size, dtype=np.int64)
    image = permute(index, np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@given(data=st.data(), size=st.integers(2**40, 2**62))
def test_permuted_indices_of_a_huge_range_are_in_range_and_distinct(
    data: st.DataObject, size: int
) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    index = np.array(indices, dtype=np.int64)
    image = permute(index, np.full_like(index, size), np.full(len(index), 7, dtype=np.uint64))
    assert ((image >= 0) & (image < size)).all()
    assert len(set(image.tolist())) == len(indices)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_entries_of_different_sizes_are_permuted_as_if_alone(sizes: list[int]) -> None:
    size = np.array(sizes, dtype=np.int64)
    key = np.arange(len(sizes), dtype=np.uint64)
    together = permute(size - 1, size, key).tolist()
    alone = [
        int(permute(size[at : at + 1] - 1, size[at : at + 1], key[at : at + 1])[0])
        for at in range(len(sizes))
    ]
    assert together == alone


@given(data=st.data(), size=st.one_of(st.integers(1, 5000), st.integers(1, 2**62)))
@example(data=None, size=1)
@example(data=None, size=2**62)
def test_unpermute_inverts_permute(data: st.DataObject | None, size: int) -> None:
    chosen = st.lists(st.integers(0, size - 1), max_size=40)
    index = np.array([0, size - 1, *(data.draw(chosen) if data else [])], dtype=np.int64)
    sizes, key = np.full_like(index, size), np.arange(len(index), dtype=np.uint64)
    assert unpermute(permute(index, sizes, key), sizes, key).tolist() == index.tolist()
    assert permute(unpermute(index, sizes, key), sizes, key).tolist() == index.tolist()


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_a_single_size_or_key_is_broadcast(size: int, key: int) -> None:
    index, keys = np.arange(size), np.full(size, key, dtype=np.uint64)
    for mix in (permute, unpermute):
        expected = mix(index, np.full(size, size), keys).tolist()
        assert mix(index, np.array([size]), keys[:1]).tolist() == expected
        assert mix(index, np.array([size]), keys).tolist() == expected
        assert mix(index, np.full(size, size), keys[:1]).tolist() == expected


def test_permutations_are_the_recorded_ones() -> None:
    """Recorded values: a change here changes the order of every data set."""
    whole = permute(np.arange(12), np.full(12, 12), np.full(12, 7, dtype=np.uint64))
    assert whole.tolist() == [8, 1, 5, 10, 4, 9, 0, 11, 3, 6, 2, 7]
    image_of = {
        1: 0,
        2: 1,
        3: 1,
        5: 1,
        16: 6,
        17: 1,
        64: 16,
        65: 60,
        1000: 477,
        4097: 2158,
        2**32 - 1: 2518941740,
        2**32 + 1: 1961664180,
        2**53 + 1: 1272459587249523,
        2**62: 3078576423239828328,
    }
    size = np.array(list(image_of))
    key = np.arange(len(size), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert permute(size // 2, size, key).tolist() == list(image_of.values())


def test_every_permutation_of_four_is_about_equally_likely() -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 4800, np.uint64)
    index, size = np.tile(np.arange(4), len(keys)), np.full(4 * len(keys), 4)
    images = permute(index, size, np.repeat(keys, 4)).reshape(-1, 4)
    counts = Counter(map(tuple, images.tolist()))
    assert set(counts) == set(permutations(range(4)))
    assert 140 < min(counts.values()) <= max(counts.values()) < 260  # 200 each, deviation 14


@settings(max_examples=60)
@given(order=orders(), epoch=st.integers(0, 4))
def test_an_epoch_holds_every_row_of_every_frame_once(order: Order, epoch: int) -> None:
    assert sorted(epoch_pairs(order, epoch)) == every_pair(order)


@settings(max_examples=40)
@given(order=orders())
def test_an_epoch_after_10_to_the_12_steps_holds_every_row_once(order: Order) -> None:
    epoch = int(order.places(10**12).epoch.max())
    assert sorted(epoch_pairs(order, epoch)) == every_pair(order)


@given(order=orders(), step=st.integers(0, 10**12), data=st.data())
def test_slices_of_the_ranks_make_up_the_global_batch(
    order: Order, step: int, data: st.DataObject
) -> None:
    rows = order.global_batch_rows
    world_size = data.draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0]))
    rank_rows = rows // world_size
    of_ranks = [
        pair
        for rank in range(world_size)
        for pair in pairs(order.places(step, rank * rank_rows, (rank + 1) * rank_rows))
    ]
    assert of_ranks == pairs(order.places(step))


@given(order=orders(), step=st.integers(0, 10**6))
def test_the_epoch_of_a_row_is_the_number_of_complete_deals_before_it(
    order: Order, step: int
) -> None:
    rows_per_lane = order.global_batch_rows // order.lanes
    expected = [
        ((step * rows_per_lane + at) // order.rows_per_frame * order.lanes + lane)
        // order.num_frames
        for lane in range(order.lanes)
        for at in range(rows_per_lane)
    ]
    assert order.places(step).epoch.tolist() == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_with_one_lane_per_rank_every_frame_is_read_by_one_rank(world_size: int) -> None:
    order = A_SMALL_ORDER
    rank_rows = order.global_batch_rows // world_size
    readers: dict[int, set[int]] = {}
    for step in range(order.rows_per_epoch // order.global_batch_rows + 1):
        for rank in range(world_size):
            places = order.places(step, rank * rank_rows, (rank + 1) * rank_rows)
            for frame, epoch in zip(places.frame.tolist(), places.epoch.tolist(), strict=True):
                if epoch == 0:
                    readers.setdefault(frame, set()).add(rank)
    assert {len(ranks) for ranks in readers.values()} == {1}


def test_a_lane_has_at_most_a_window_of_frames_open() -> None:
    order = A_SMALL_ORDER
    rows_per_lane = order.global_batch_rows // order.lanes
    rows_per_window = order.window_frames * order.rows_per_frame
    lane = [pair for step in range(100) for pair in pairs(order.places(step, 0, rows_per_lane))]
    rows_of_lane_in_epoch = order.rows_per_epoch // order.lanes
    first_epoch = lane[:rows_of_lane_in_epoch]
    windows = [
        {frame for frame, _ in first_epoch[start : start + rows_per_window]}
        for start in range(0, rows_of_lane_in_epoch, rows_per_window)
    ]
    assert [len(frames) for frames in windows] == [3, 2]  # a lane has 20 / 4 frames per epoch


def test_epochs_have_different_orders() -> None:
    assert epoch_pairs(A_SMALL_ORDER, 0) != epoch_pairs(A_SMALL_ORDER, 1)


def test_seeds_have_different_orders() -> None:
    other = replace(A_SMALL_ORDER, seed=2)
    assert pairs(A_SMALL_ORDER.places(0)) != pairs(other.places(0))


@pytest.mark.parametrize(
    ("order", "step", "expected"),
    [
        (
            Order(num_frames=5, rows_per_frame=4, global_batch_rows=6, lanes=2, seed=3),
            2,
            [(0, 3, 1), (0, 2, 3), (0, 3, 3), (0, 1, 3), (0, 1, 2), (1, 4, 3)],
        ),
        (
            Order(num_frames=5, rows_per_frame=4, global_batch_rows=6, lanes=2, seed=3),
            6,
            [(1, 3, 1), (1, 1, 3), (2, 0, 2), (1, 0, 2), (1, 0, 3), (2, 4, 1)],
        ),
        (A_SMALL_ORDER, 41, [(3, 18, 3), (3, 16, 7), (3, 16, 3), (3, 4, 3), (3, 4, 6)]),
        (
            Order(num_frames=1000, rows_per_frame=33, global_batch_rows=8, lanes=2, seed=5),
            123_456,
            [(29, 359, 24), (29, 476, 17), (29, 359, 26), (29, 279, 26), (29, 555, 26)],
        ),
        (
            replace(A_LARGE_ORDER, global_batch_rows=1024),
            10**9,
            [(69, 163080542, 5), (69, 139404342, 16), (69, 182371041, 19), (69, 22819969, 19)],
        ),
    ],
)
def test_rows_are_the_recorded_ones(
    order: Order, step: int, expected: list[tuple[int, int, int]]
) -> None:
    """Recorded epoch, frame, row: a change here changes the data of every run."""
    places = order.places(step, 0, len(expected))
    found = zip(places.epoch.tolist(), *zip(*pairs(places), strict=True), strict=True)
    assert list(found) == expected


def step_and_position(order: Order, steps: list[int]) -> tuple[Indices, Indices]:
    """Every position of each step: two arrays of shape (steps, global_batch_rows)."""
    step, position = np.array(steps)[:, None], np.arange(order.global_batch_rows)
    return tuple(np.broadcast_arrays(step, position))


@given(order=orders(), steps=st.lists(st.integers(0, 10**12), min_size=1, max_size=6))
def test_rows_of_several_steps_equal_those_of_each_step(order: Order, steps: list[int]) -> None:
    together = order.places_of(*step_and_position(order, steps))
    for number, step in enumerate(steps):
        alone = order.places(step)
        for name in ("epoch", "frame", "row"):
            assert getattr(together, name)[number].tolist() == getattr(alone, name).tolist()


def test_an_empty_batch_has_no_places() -> None:
    nothing = np.empty(0, dtype=np.int64)
    assert pairs(A_SMALL_ORDER.places_of(nothing, nothing)) == []
    assert [len(found) for found in A_SMALL_ORDER.find(nothing, nothing, nothing)] == [0, 0]


@given(order=orders(), data=st.data())
def test_a_row_is_found_at_the_step_and_position_that_read_it(
    order: Order, data: st.DataObject
) -> None:
    around_an_epochs_end = order.rows_per_epoch * data.draw(st.integers(0, 5))
    near = around_an_epochs_end // order.global_batch_rows + data.draw(st.integers(-3, 3))
    anywhere = data.draw(st.integers(0, 10**12))
    step, position = step_and_position(order, [max(near, 0), anywhere])
    places = order.places_of(step, position)
    found_step, found_position = order.find(places.epoch, places.frame, places.row)
    assert found_step.tolist() == step.tolist()
    assert found_position.tolist() == position.tolist()


@given(order=orders(), epoch=st.integers(0, 10**6))
def test_the_step_and_position_of_a_row_read_it_in_the_requested_epoch(
    order: Order, epoch: int
) -> None:
    frame, row = np.array(every_pair(order)).T
    step, position = order.find(np.full_like(frame, epoch), frame, row)
    assert (step >= 0).all()
    assert ((position >= 0) & (position < order.global_batch_rows)).all()
    places = order.places_of(step, position)
    assert set(places.epoch.tolist()) == {epoch}
    assert pairs(places) == every_pair(order)


@pytest.mark.parametrize("step", [0, 10**6, 10**9])
def test_rows_of_15_trillion_tokens_are_in_range_and_found_again(step: int) -> None:
    order = A_LARGE_ORDER
    places = order.places(step)
    rows_before = step * order.global_batch_rows
    assert np.abs(places.epoch - rows_before / order.rows_per_epoch).max() < 1
    assert ((places.frame >= 0) & (places.frame < order.num_frames)).all()
    assert ((places.row >= 0) & (places.row < order.rows_per_frame)).all()
    assert len(set(pairs(places))) == order.global_batch_rows
    found_step, position = order.find(places.epoch, places.frame, places.row)
    assert set(found_step.tolist()) == {step}
    assert position.tolist() == list(range(order.global_batch_rows))


def test_the_arithmetic_of_a_large_order_is_that_of_unbounded_integers() -> None:
    order, step = A_LARGE_ORDER, 10**9
    rows_per_lane = order.global_batch_rows // order.lanes
    lane_row = [step * rows_per_lane + at % rows_per_lane for at in range(order.global_batch_rows)]
    expected = [
        (row // order.rows_per_frame * order.lanes + at // rows_per_lane) // order.num_frames
        for at, row in enumerate(lane_row)
    ]
    assert min(expected) > 1000
    assert order.places(step).epoch.tolist() == expected


def test_frames_are_not_read_in_stored_order() -> None:
    order = Order(num_frames=1000, rows_per_frame=1, global_batch_rows=4, lanes=4, seed=5)
    neighbors = 0
    for lane in range(order.lanes):
        frames = [int(order.places(step, lane, lane + 1).frame[0]) for step in range(250)]
        neighbors += int((np.diff(frames) == 1).sum())
    assert neighbors < 10  # one in a thousand pairs by chance


def test_rows_of_a_window_are_mixed() -> None:
    order = Order(num_frames=64, rows_per_frame=64, global_batch_rows=64, lanes=1, seed=5)
    places = order.places(0)
    assert len(set(places.frame.tolist())) == order.window_frames
    in_sequence = (np.diff(places.frame) == 0) & (np.diff(places.row) == 1)
    assert in_sequence.sum() < 4


def test_the_places_of_a_frame_in_two_epochs_are_uncorrelated() -> None:
    order = Order(num_frames=1000, rows_per_frame=1, global_batch_rows=10, lanes=10, seed=5)
    first, second = ([frame for frame, _ in epoch_pairs(order, epoch)] for epoch in (0, 1))
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.15


@pytest.mark.parametrize("step", [10**6, 10**12])
def test_the_time_to_compute_a_step_does_not_depend_on_its_number(step: int) -> None:
    order = Order(num_frames=10**9, rows_per_frame=64, global_batch_rows=1024, lanes=1024, seed=1)

    def fastest_s(of_step: int) -> float:
        times_s = []
        for _ in range(5):
            start_s = time.perf_counter()
            order.places(of_step)
            times_s.append(time.perf_counter() - start_s)
        return min(times_s)

    assert fastest_s(step) < 10 * fastest_s(0)


@given(num_frames=st.integers(1, 3000), global_batch_rows=st.integers(1, 5000))
def test_chosen_lanes_are_the_most_that_divide_the_batch_and_have_a_frame_each(
    num_frames: int, global_batch_rows: int
) -> None:
    possible = [
        lanes for lanes in range(1, min(num_frames, 1024) + 1) if global_batch_rows % lanes == 0
    ]
    assert choose_lanes(num_frames, global_batch_rows) == max(possible)


def test_lanes_that_do_not_divide_the_batch_are_refused_with_both_numbers() -> None:
    with pytest.raises(BatchError, match=r"5 .* 12"):
        replace(A_SMALL_ORDER, lanes=5)


@pytest.mark.parametrize(
    "field", ["num_frames", "rows_per_frame", "global_batch_rows", "lanes", "window_frames"]
)
def test_a_number_below_1_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be at least 1, got 0$"):
        replace(A_SMALL_ORDER, **{field: 0})
