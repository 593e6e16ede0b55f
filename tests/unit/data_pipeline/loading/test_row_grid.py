"""Row grid: each row that holds tokens has exactly one place in the rectangle."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.loading.row_grid import RowGrid

FRAME_TOKENS = 64
SHARDS = st.lists(st.integers(1, 400), min_size=1, max_size=8)
CONTEXTS = st.sampled_from([2, 16, 64])


def table(shards: list[int], context_tokens: int) -> RowGrid:
    return RowGrid(np.array(shards, dtype=np.int64), FRAME_TOKENS, context_tokens)


def stored_rows(shards: list[int], context_tokens: int) -> list[tuple[int, int]]:
    """(frame, row) of every stored row that holds at least a token."""
    frames = [
        min(FRAME_TOKENS, tokens - start)
        for tokens in shards
        for start in range(0, tokens, FRAME_TOKENS)
    ]
    return [
        (frame, row)
        for frame, tokens in enumerate(frames)
        for row in range(-(-tokens // context_tokens))
    ]


def located(chosen: RowGrid) -> list[tuple[int, int]]:
    """Stored frame and row of every place of the rectangle, frame by frame."""
    frame, row = np.divmod(
        np.arange(chosen.num_frames * chosen.rows_per_frame), chosen.rows_per_frame
    )
    return list(zip(*(part.tolist() for part in chosen.locate(frame, row)), strict=True))


@given(shards=SHARDS, context_tokens=CONTEXTS)
@example(shards=[64, 128], context_tokens=16)  # no frame is short
@example(shards=[1, 63, 20], context_tokens=16)  # every frame is short
@example(shards=[64, 1, 128, 65], context_tokens=16)
def test_every_row_with_tokens_has_exactly_one_place(
    shards: list[int], context_tokens: int
) -> None:
    chosen = table(shards, context_tokens)
    assert sorted(located(chosen)[: chosen.num_rows]) == stored_rows(shards, context_tokens)


@given(shards=SHARDS, context_tokens=CONTEXTS)
def test_a_place_beyond_the_last_row_is_past_the_end_of_a_frame(
    shards: list[int], context_tokens: int
) -> None:
    chosen = table(shards, context_tokens)
    rows_of_frame = dict(stored_rows(shards, context_tokens))  # the last row of each frame
    beyond = located(chosen)[chosen.num_rows :]
    assert [place for place in beyond if place[1] <= rows_of_frame[place[0]]] == []


@given(shards=SHARDS, context_tokens=CONTEXTS)
def test_less_than_a_frame_of_the_rectangle_is_empty(
    shards: list[int], context_tokens: int
) -> None:
    chosen = table(shards, context_tokens)
    empty = chosen.num_frames * chosen.rows_per_frame - chosen.num_rows
    assert 0 <= empty < chosen.rows_per_frame


@given(shards=SHARDS, context_tokens=CONTEXTS)
@example(shards=[64, 128], context_tokens=16)  # no frame is short
@example(shards=[1, 63, 20], context_tokens=16)  # every frame is short
@example(shards=[20, 0, 64, 0], context_tokens=16)
def test_the_place_of_a_stored_row_is_the_one_that_locates_it(
    shards: list[int], context_tokens: int
) -> None:
    chosen = table(shards, context_tokens)
    number = np.arange(chosen.num_rows)
    frame, row = chosen.place_of(*chosen.locate(*np.divmod(number, chosen.rows_per_frame)))
    assert (frame * chosen.rows_per_frame + row).tolist() == number.tolist()
    assert (row < chosen.rows_per_frame).all()


def test_rows_of_15_trillion_tokens_have_places_and_are_found_at_them() -> None:
    generator = np.random.default_rng(0)
    shard_tokens = generator.integers(10**9, 2 * 10**9, 10_000)
    chosen = RowGrid(shard_tokens, 65_536, 1024)
    assert chosen.num_rows > 1.4e10
    number = np.append(generator.integers(0, chosen.num_rows, 1000), chosen.num_rows - 1)
    frame, row = chosen.place_of(*chosen.locate(*np.divmod(number, chosen.rows_per_frame)))
    assert (frame * chosen.rows_per_frame + row).tolist() == number.tolist()
