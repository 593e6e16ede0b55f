"""Order after a change of the batch: every row once per epoch, each lane as before."""

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loading.order import Order
from tests.helpers.orders import every_pair, orders, pairs


def after(order: Order, num_steps: int, rows_per_lane: int) -> tuple[Order, int]:
    """The order after steps of another batch, and its first step."""
    batch_rows, rows = order.lanes * rows_per_lane, num_steps * order.global_batch_rows
    whole_steps = -(-rows // batch_rows)
    missing_rows = (whole_steps * batch_rows - rows) // order.lanes
    changed = replace(order, global_batch_rows=batch_rows, missing_rows=missing_rows)
    return changed, whole_steps


@given(order=orders(), num_steps=st.integers(0, 12), rows_per_lane=st.integers(1, 7))
def test_every_row_is_read_once_per_epoch_across_a_change_of_the_batch(
    order: Order, num_steps: int, rows_per_lane: int
) -> None:
    changed, first = after(order, num_steps, rows_per_lane)
    num_rows = 2 * order.rows_per_epoch + order.global_batch_rows * order.rows_per_frame
    last = first + -(-num_rows // changed.global_batch_rows)

    places = [order.places(step) for step in range(num_steps)]
    places += [changed.places(step) for step in range(first, last)]

    found = Counter(
        (epoch, *pair)
        for one in places
        for epoch, pair in zip(one.epoch.tolist(), pairs(one), strict=True)
    )
    expected = {(epoch, *pair) for epoch in (0, 1) for pair in every_pair(order)}
    assert max(found.values()) == 1
    assert expected <= found.keys()


@given(order=orders(), num_steps=st.integers(0, 12), rows_per_lane=st.integers(1, 7))
def test_a_change_of_the_batch_keeps_the_order_of_every_lane(
    order: Order, num_steps: int, rows_per_lane: int
) -> None:
    changed, first = after(order, num_steps, rows_per_lane)
    one_by_one = replace(order, global_batch_rows=order.lanes)
    before = num_steps * order.global_batch_rows // order.lanes

    step = np.arange(first, first + 5)
    for lane in range(order.lanes):
        position = np.tile(lane * rows_per_lane + np.arange(rows_per_lane), (len(step), 1))
        found = changed.places_of(np.broadcast_to(step[:, None], position.shape), position)
        lane_row = before + np.arange(position.size)
        expected = one_by_one.places_of(lane_row, np.full_like(lane_row, lane))
        assert found.frame.reshape(-1).tolist() == expected.frame.tolist()
        assert found.row.reshape(-1).tolist() == expected.row.tolist()
        found_step, found_position = changed.find(found.epoch, found.frame, found.row)
        assert (found_step == step[:, None]).all()
        assert (found_position == position).all()
