"""Small orders, and their rows as pairs."""

from hypothesis import strategies as st

from data_pipeline.loading.order import Order, RowPlace


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 12))
    return Order(
        num_frames=draw(st.integers(1, 24)),
        rows_per_frame=draw(st.integers(1, 6)),
        global_batch_rows=lanes * draw(st.integers(1, 6)),
        lanes=lanes,
        seed=draw(st.integers(0, 2**63)),
        window_frames=draw(st.integers(1, 10)),
    )


def pairs(places: RowPlace) -> list[tuple[int, int]]:
    return list(zip(places.frame.tolist(), places.row.tolist(), strict=True))


def every_pair(order: Order) -> list[tuple[int, int]]:
    return [
        (frame, row) for frame in range(order.num_frames) for row in range(order.rows_per_frame)
    ]
