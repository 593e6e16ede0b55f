"""Rows and targets: every token is read, every target that can be learned is there exactly once."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import BatchError, ConfigError, ShardCorruptError
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.loader import SequentialRows, sequential_batches
from data_pipeline.loading.rows import IGNORED_TARGET, Batch, RowReader, check_context
from data_pipeline.shards.data_set import DataSet as OpenDataSet
from data_pipeline.shards.data_set import LocalFolder
from data_pipeline.shards.reader import ShardReader
from data_pipeline.text.codec import Direction
from tests.helpers.batches import (
    BEGIN,
    CONTEXT_TOKENS,
    CONTEXTS,
    DIRECTIONS,
    END,
    QUICKLY,
    DataSet,
    Ids,
    data_set,
    document_shards,
    mirrored,
    write_data_set,
)

WORLD_SIZES = st.sampled_from([1, 2, 3, 5, 7])


def batch_of_everything(data: DataSet, rows: RowReader) -> Batch:
    rows_per_frame = data.manifest.frame_tokens // rows.context_tokens
    places = [(frame, row) for frame in range(len(data.frames)) for row in range(rows_per_frame)]
    table = np.array(places)
    return rows.batch(table[:, 0], table[:, 1])


def bigrams(batch: Batch) -> Counter[tuple[int, int]]:
    """(id, target) of every target that is not ignored."""
    pairs = zip(batch.ids_T.tolist(), batch.targets_T.tolist(), strict=True)
    return Counter(pair for pair in pairs if pair[1] != IGNORED_TARGET)


def learnable_bigrams(frame: Ids) -> Counter[tuple[int, int]]:
    pairs = zip(frame[:-1].tolist(), frame[1:].tolist(), strict=True)
    return Counter(pair for pair in pairs if pair != (END, BEGIN))


def total(counters: Iterator[Counter[tuple[int, int]]]) -> Counter[tuple[int, int]]:
    return sum(counters, start=Counter())


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS)
def test_rows_hold_every_token_in_stored_order(
    shards: list[list[Ids]], context_tokens: int
) -> None:
    with data_set(shards) as data:
        batch = batch_of_everything(data, data.rows(context_tokens))
    for frame, ids in zip(data.frames, batch.ids_T.reshape(-1, 64), strict=True):
        assert ids[: len(frame)].tolist() == frame.tolist()


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS)
def test_a_target_is_the_next_token_or_ignored_for_one_of_three_reasons(
    shards: list[list[Ids]], context_tokens: int
) -> None:
    """Past the frame's end (padding included), and from an end marker to the next begin marker."""
    with data_set(shards) as data:
        batch = batch_of_everything(data, data.rows(context_tokens))
    for frame, targets in zip(data.frames, batch.targets_T.reshape(-1, 64), strict=True):
        expected = np.full(64, IGNORED_TARGET)
        expected[: len(frame) - 1] = frame[1:]
        expected[: len(frame) - 1][(frame[:-1] == END) & (frame[1:] == BEGIN)] = IGNORED_TARGET
        assert targets.tolist() == expected.tolist()


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS, direction=DIRECTIONS)
def test_attention_restarts_at_every_row_and_begin_marker(
    shards: list[list[Ids]], context_tokens: int, direction: Direction
) -> None:
    with data_set(shards) as data:
        batch = batch_of_everything(data, data.rows(context_tokens, direction))
    row_starts = set(range(0, len(batch.ids_T), context_tokens))
    begins = set(np.flatnonzero(batch.ids_T == BEGIN).tolist())
    assert batch.cu_seqlens.tolist() == sorted(row_starts | begins | {len(batch.ids_T)})


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS, direction=DIRECTIONS)
def test_positions_restart_with_attention(
    shards: list[list[Ids]], context_tokens: int, direction: Direction
) -> None:
    with data_set(shards) as data:
        batch = batch_of_everything(data, data.rows(context_tokens, direction))
    lengths = np.diff(batch.cu_seqlens).tolist()
    expected = [position for length in lengths for position in range(length)]
    assert batch.positions_T.tolist() == expected


def test_the_arrays_of_a_batch_have_the_documented_types(small: DataSet) -> None:
    batch = batch_of_everything(small, small.rows(16))
    arrays = (batch.ids_T, batch.targets_T, batch.positions_T, batch.cu_seqlens)
    assert [str(array.dtype) for array in arrays] == ["int64", "int64", "int64", "int32"]


@QUICKLY
@given(
    shards=document_shards(),
    context_tokens=CONTEXTS,
    direction=DIRECTIONS,
    world_size=WORLD_SIZES,
    micro_batch_rows=st.integers(1, 5),
)
def test_sequential_batches_give_every_target_once_over_the_ranks(
    shards: list[list[Ids]],
    context_tokens: int,
    direction: Direction,
    world_size: int,
    micro_batch_rows: int,
) -> None:
    with data_set(shards) as data:
        rows = data.rows(context_tokens, direction)
        found = total(
            bigrams(batch)
            for rank in range(world_size)
            for batch in sequential_batches(rows, rank, world_size, micro_batch_rows)
        )
    flip = direction is Direction.FORWARD
    expected = total(learnable_bigrams(mirrored(frame) if flip else frame) for frame in data.frames)
    assert found == expected


@QUICKLY
@given(
    shards=document_shards(),
    others=document_shards(),
    max_rows=st.integers(1, 9),
    world_size=WORLD_SIZES,
    micro_batch_rows=st.integers(1, 5),
)
def test_a_part_of_the_rows_is_the_same_for_any_ranks_and_at_equal_distances(
    shards: list[list[Ids]],
    others: list[list[Ids]],
    max_rows: int,
    world_size: int,
    micro_batch_rows: int,
) -> None:
    with data_set(shards) as data, data_set(others) as other:
        readers = [data.rows(CONTEXT_TOKENS), other.rows(CONTEXT_TOKENS)]

        def rows_of(world_size: int, micro_batch_rows: int, limit: int | None) -> list[list[int]]:
            found, sizes = [], set()
            for rank in range(world_size):
                rows = SequentialRows(readers, rank, world_size, micro_batch_rows, max_rows=limit)
                sizes.add(rows.num_rows)
                for batch in rows.slices(0, rows.num_rows, 1, 1):
                    if batch.num_targets:
                        found.append([*batch.ids_T.tolist(), *batch.targets_T.tolist()])
            assert len(sizes) == 1  # ranks run every forward pass together
            return sorted(found)

        every = rows_of(1, 1, None)
        part = rows_of(world_size, micro_batch_rows, max_rows)
        assert part == rows_of(1, 1, max_rows)
        assert not Counter(map(tuple, part)) - Counter(map(tuple, every))
        dealt = SequentialRows(readers, 0, 1, 1, max_rows=max_rows)
        assert (dealt.rows_read, dealt.num_rows) == (min(max_rows, dealt.rows_of_split),) * 2
        if max_rows >= dealt.rows_of_split:
            assert part == every


def test_rows_of_a_part_are_spread_over_the_whole_set(small: DataSet) -> None:
    reader = small.rows(CONTEXT_TOKENS)
    whole = SequentialRows([reader], 0, 1, 1)
    every = [batch.ids_T.tolist() for batch in whole.slices(0, whole.num_rows, 1, 1)]
    part = SequentialRows([reader], 0, 1, 1, max_rows=len(every) // 2)
    read = [batch.ids_T.tolist() for batch in part.slices(0, part.num_rows, 1, 1)]
    assert len(every) >= 4
    assert read == every[1 if len(every) % 2 == 0 else 2 :: 2]


@QUICKLY
@given(
    shards=document_shards(),
    context_tokens=CONTEXTS,
    world_size=WORLD_SIZES,
    micro_batch_rows=st.integers(1, 5),
)
def test_every_rank_gets_the_same_number_of_equal_sequential_batches(
    shards: list[list[Ids]], context_tokens: int, world_size: int, micro_batch_rows: int
) -> None:
    with data_set(shards) as data:
        rows = data.rows(context_tokens)
        sizes = [
            [
                len(batch.ids_T)
                for batch in sequential_batches(rows, rank, world_size, micro_batch_rows)
            ]
            for rank in range(world_size)
        ]
    assert sizes == [sizes[0]] * world_size
    assert set(sizes[0]) == {micro_batch_rows * context_tokens}


def test_a_val_set_with_fewer_rows_than_ranks_gives_a_batch_to_every_rank(small: DataSet) -> None:
    rows = small.rows(CONTEXT_TOKENS)
    (whole,) = sequential_batches(rows, 0, 1, 512)
    of_ranks = [list(sequential_batches(rows, rank, 512, 1)) for rank in range(512)]

    assert {len(batches) for batches in of_ranks} == {1}
    assert sum(batch.num_targets > 0 for (batch,) in of_ranks) < 512
    together = np.concatenate([batch.targets_T for (batch,) in of_ranks])
    assert together.tolist() == whole.targets_T.tolist()


def test_a_row_past_the_end_of_a_short_frame_has_no_targets(small: DataSet) -> None:
    last = len(small.frames) - 1
    rows = small.rows(16)
    assert len(small.frames[last]) < 48
    assert rows.batch(np.array([last]), np.array([3])).num_targets == 0


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 3), (2, 2), (3, 4), (12, 1)])
def test_ranks_and_micro_batches_do_not_change_the_rows_of_a_step(
    small: DataSet, world_size: int, micro_batch_rows: int
) -> None:
    (whole,) = small.training(small.store(), micro_batch_rows=12).at(5)
    of_ranks = [
        batch
        for rank in range(world_size)
        for batch in small.training(small.store(), rank, world_size, micro_batch_rows).at(5)
    ]
    assert {len(batch.ids_T) for batch in of_ranks} == {CONTEXT_TOKENS * micro_batch_rows}
    assert np.concatenate([batch.ids_T for batch in of_ranks]).tolist() == whole.ids_T.tolist()


@QUICKLY
@given(shards=document_shards())
def test_an_epoch_of_training_has_every_target_once(shards: list[list[Ids]]) -> None:
    with data_set(shards) as data:
        training = data.training(data.store())
        _, order = data.table_and_order()
        found: Counter[tuple[int, int]] = Counter()
        for step in range(2 * order.rows_per_epoch // order.global_batch_rows + order.lanes):
            epochs = order.places(step).epoch
            batches = zip(training.at(step), epochs, strict=True)
            found += total(bigrams(batch) for batch, epoch in batches if epoch == 0)
    assert found == total(learnable_bigrams(frame) for frame in data.frames)


def test_any_step_can_be_read_at_any_time(small: DataSet) -> None:
    training = small.training(small.store(), micro_batch_rows=12)
    in_turn = [training.at(step)[0].ids_T.tolist() for step in range(6)]
    assert [training.at(step)[0].ids_T.tolist() for step in reversed(range(6))] == in_turn[::-1]


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(5, 1), (2, 4), (12, 2)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers(
    small: DataSet, world_size: int, micro_batch_rows: int
) -> None:
    with pytest.raises(BatchError, match=rf"{world_size} ranks x {micro_batch_rows} .* 12"):
        small.training(small.store(), 0, world_size, micro_batch_rows)


def test_with_one_lane_per_rank_every_frame_is_decoded_once_per_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    documents = [np.array([BEGIN, *generator.integers(3, 600, 126), END]) for _ in range(32)]
    data = write_data_set(tmp_path, [documents])
    decoded: list[int] = []
    decode = ShardReader.frame

    def counting(reader: ShardReader, frame: int) -> npt.NDArray[np.unsignedinteger]:
        decoded.append(frame)
        return decode(reader, frame)

    monkeypatch.setattr(ShardReader, "frame", counting)
    _, order = data.table_and_order()
    for rank in range(2):
        training = data.training(data.store(keep_frames=1), rank, world_size=2)
        for step in range(order.rows_per_epoch // order.global_batch_rows):
            training.at(step)
    assert max(Counter(decoded).values()) == 1


@pytest.mark.parametrize("context_tokens", [24, 128, 63])
def test_a_context_that_does_not_divide_a_frame_is_refused(context_tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"{context_tokens}.* 64 tokens"):
        check_context(context_tokens, 64)


def test_an_empty_split_is_refused_by_name(small: DataSet) -> None:
    with pytest.raises(ConfigError, match="val set"):
        FrameStore(OpenDataSet(LocalFolder(small.folder), small.manifest), "val")


def test_more_shards_than_may_be_open_can_be_read(
    small: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.loading.frame_store._OPEN_SHARDS", 1)
    store = small.store(keep_frames=1)
    numbers = [*range(len(small.frames)), *range(len(small.frames))]
    assert [store.frame(number).tolist() for number in numbers] == [
        small.frames[number].tolist() for number in numbers
    ]


@QUICKLY
@given(shards=document_shards())
def test_the_length_of_a_frame_is_known_without_reading_it(shards: list[list[Ids]]) -> None:
    with data_set(shards) as data:
        store = data.store()
        lengths = store.num_tokens(np.arange(store.num_frames)).tolist()
    assert lengths == list(map(len, data.frames))


def test_a_shard_that_is_not_the_one_in_the_manifest_is_named(small: DataSet) -> None:
    first, second = (small.folder / entry.file for entry in small.manifest.shards)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ShardCorruptError, match=first.name):
        small.store().frame(0)


def test_a_corrupt_frame_is_named_by_file_frame_and_byte(small: DataSet) -> None:
    path = small.folder / small.manifest.shards[0].file
    damaged = bytearray(path.read_bytes())
    damaged[20:24] = b"\xff\xff\xff\xff"
    path.write_bytes(damaged)
    with pytest.raises(ShardCorruptError, match=rf"{path.name}.*frame 0 at byte 0"):
        small.store().frame(0)
