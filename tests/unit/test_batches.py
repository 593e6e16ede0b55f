"""Rows and targets: every token is read, every target that can be learnt is there exactly once."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import (
    IGNORED_TARGET,
    Batch,
    FrameStore,
    RowReader,
    TrainingBatches,
    check_context,
    format_read_as,
    sequential_batches,
)
from data_pipeline.errors import BatchError, ConfigError, DirectionMismatchError, ShardCorruptError
from data_pipeline.manifest import Manifest, ShardEntry
from data_pipeline.order import Order
from data_pipeline.row_table import RowTable
from data_pipeline.shard_format import ShardReader, ShardWriter
from data_pipeline.text import Direction, TextCodec, TextFormat, Unit

Codecs = Callable[..., TextCodec]
Ids = npt.NDArray[np.int64]

BEGIN, END = 1, 2
FRAME_TOKENS = 64
CONTEXT_TOKENS = 16  # where it does not matter
BACKWARD_TOKENS = TextFormat(Direction.BACKWARD, Unit.TOKEN, "5" * 64)


@dataclass
class DataSet:
    """Shards of given documents, and what they should hold."""

    folder: Path
    manifest: Manifest
    frames: list[Ids]

    def store(self, keep_frames: int = 64) -> FrameStore:
        return FrameStore(self.folder, self.manifest, "train", keep_frames)

    def rows(self, context_tokens: int, direction: Direction = Direction.BACKWARD) -> RowReader:
        return RowReader(self.store(), context_tokens, direction)

    def training(
        self, store: FrameStore, rank: int = 0, world_size: int = 1, micro_batch_rows: int = 1
    ) -> TrainingBatches:
        rows = RowReader(store, CONTEXT_TOKENS, Direction.BACKWARD)
        table, order = self.table_and_order()
        return TrainingBatches(store, rows, table, order, rank, world_size, micro_batch_rows)

    def table_and_order(self) -> tuple[RowTable, Order]:
        table = RowTable(self.store().shard_tokens, self.manifest.frame_tokens, CONTEXT_TOKENS)
        order = Order(
            num_frames=table.num_frames,
            rows_per_frame=table.rows_per_frame,
            global_batch_rows=12,
            lanes=4,
            seed=1,
            window_frames=2,
        )
        return table, order


def write_data_set(
    folder: Path,
    shards: list[list[Ids]],
    frame_tokens: int = FRAME_TOKENS,
    text_format: TextFormat = BACKWARD_TOKENS,
    begin_id: int = BEGIN,
    end_id: int = END,
) -> DataSet:
    entries, frames = [], []
    for number, documents in enumerate(shards):
        name = f"train-{number:05d}-00000.zst"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file, text_format.to_dict(), np.dtype("<u2"), frame_tokens)
            for document in documents:
                writer.add(document, text_bytes=len(document))
            entries.append(ShardEntry(name, "train", **asdict(writer.finish())))
        ids = np.concatenate(documents)
        frames += [ids[start : start + frame_tokens] for start in range(0, len(ids), frame_tokens)]
    manifest = Manifest(
        text_format=text_format,
        vocab_size=600,
        begin_id=begin_id,
        end_id=end_id,
        id_bytes=2,
        frame_tokens=frame_tokens,
        source="test",
        val_fraction=0.0,
        empty_documents=0,
        shards=tuple(entries),
    )
    return DataSet(folder, manifest, frames)


@st.composite
def document_shards(draw: st.DrawFn) -> list[list[Ids]]:
    """One to three shards of documents, markers included, of 2 to about 150 tokens."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = st.lists(st.one_of(st.integers(0, 6), st.integers(0, 150)), min_size=1, max_size=12)
    return [
        [np.array([BEGIN, *generator.integers(3, 600, length), END]) for length in of_shard]
        for of_shard in draw(st.lists(lengths, min_size=1, max_size=3))
    ]


@contextmanager
def data_set(shards: list[list[Ids]]) -> Iterator[DataSet]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_data_set(Path(folder), shards)


CONTEXTS = st.sampled_from([2, 16, 64])
DIRECTIONS = st.sampled_from(list(Direction))
QUICKLY = settings(max_examples=25)


def some_shards() -> list[list[Ids]]:
    """Two shards of four and two frames, the last frame of each short."""
    generator = np.random.default_rng(4)
    lengths = [[30, 5, 0, 120, 44], [9, 64, 1]]
    return [
        [np.array([BEGIN, *generator.integers(3, 600, length), END]) for length in of_shard]
        for of_shard in lengths
    ]


@pytest.fixture
def small(tmp_path: Path) -> DataSet:
    return write_data_set(tmp_path, some_shards())


def batch_of_everything(data: DataSet, rows: RowReader) -> Batch:
    rows_per_frame = data.manifest.frame_tokens // rows.context_tokens
    places = [(frame, row) for frame in range(len(data.frames)) for row in range(rows_per_frame)]
    table = np.array(places)
    return rows.batch(table[:, 0], table[:, 1])


def mirrored(ids: Ids) -> Ids:
    """The same tokens from their other end, with begin and end markers exchanged."""
    exchanged = {BEGIN: END, END: BEGIN}
    return np.array([exchanged.get(piece_id, piece_id) for piece_id in ids[::-1].tolist()])


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
def test_attention_starts_afresh_at_every_row_and_begin_marker(
    shards: list[list[Ids]], context_tokens: int, direction: Direction
) -> None:
    with data_set(shards) as data:
        batch = batch_of_everything(data, data.rows(context_tokens, direction))
    row_starts = set(range(0, len(batch.ids_T), context_tokens))
    begins = set(np.flatnonzero(batch.ids_T == BEGIN).tolist())
    assert batch.cu_seqlens.tolist() == sorted(row_starts | begins | {len(batch.ids_T)})


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS, direction=DIRECTIONS)
def test_positions_count_from_where_attention_starts(
    shards: list[list[Ids]], context_tokens: int, direction: Direction
) -> None:
    with data_set(shards) as data:
        batch = batch_of_everything(data, data.rows(context_tokens, direction))
    lengths = np.diff(batch.cu_seqlens).tolist()
    expected = [position for length in lengths for position in range(length)]
    assert batch.positions_T.tolist() == expected


def test_the_arrays_of_a_batch_have_the_promised_types(small: DataSet) -> None:
    batch = batch_of_everything(small, small.rows(16))
    arrays = (batch.ids_T, batch.targets_T, batch.positions_T, batch.cu_seqlens)
    assert [str(array.dtype) for array in arrays] == ["int64", "int64", "int64", "int32"]


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS)
def test_the_other_direction_reads_the_same_windows_from_their_other_end(
    shards: list[list[Ids]], context_tokens: int
) -> None:
    with data_set(shards) as data:
        stored = data.rows(context_tokens, Direction.BACKWARD)
        flipped = data.rows(context_tokens, Direction.FORWARD)
        for frame in range(len(data.frames)):
            for row in range(FRAME_TOKENS // context_tokens):
                expected = mirrored(stored.window(frame, row)).tolist()
                assert flipped.window(frame, row).tolist() == expected


def test_reading_in_the_other_direction_leaves_the_stored_one_as_it_was(small: DataSet) -> None:
    store = small.store()
    before = store.frame(0).tolist()
    RowReader(store, 16, Direction.FORWARD).window(0, 0)
    assert store.frame(0).tolist() == before


def whole_documents(window: Ids, codec: TextCodec) -> Iterator[tuple[int, ...]]:
    begin = None
    for at, piece_id in enumerate(window.tolist()):
        if piece_id == codec.begin_id:
            begin = at
        elif piece_id == codec.end_id and begin is not None:
            yield tuple(window[begin : at + 1].tolist())


def test_backward_shards_read_forward_hold_the_documents_of_forward_shards(
    tmp_path: Path, codec: Codecs, english_documents: list[str]
) -> None:
    backward, forward = codec(Direction.BACKWARD), codec(Direction.FORWARD)
    data = write_data_set(
        tmp_path,
        [[backward.encode_document(text) for text in english_documents[:100]]],
        frame_tokens=1024,
        text_format=backward.format,
        begin_id=backward.begin_id,
        end_id=backward.end_id,
    )
    forward_of = {
        tuple(backward.encode_document(text).tolist()): tuple(
            forward.encode_document(text).tolist()
        )
        for text in english_documents[:100]
    }
    stored, flipped = data.rows(256), data.rows(256, Direction.FORWARD)
    num_compared = 0
    for frame in range(len(data.frames)):
        for row in range(4):
            documents = list(whole_documents(stored.window(frame, row), backward))
            expected = [forward_of[document] for document in reversed(documents)]
            assert list(whole_documents(flipped.window(frame, row), forward)) == expected
            num_compared += len(expected)
    assert num_compared > 50


def test_a_flipped_reader_says_in_which_direction_it_reads(small: DataSet) -> None:
    rows = small.rows(16, Direction.FORWARD)
    assert rows.text_format == replace(BACKWARD_TOKENS, direction=Direction.FORWARD)


@pytest.mark.parametrize("stored", list(Direction))
def test_word_shards_refuse_to_be_flipped_and_name_both_directions(stored: Direction) -> None:
    with pytest.raises(DirectionMismatchError) as caught:
        format_read_as(TextFormat(stored, Unit.WORD, "5" * 64), stored.opposite)
    message = str(caught.value)
    assert [name for name in ("'backward'", "'forward'", "'word'") if name not in message] == []


def test_word_shards_are_read_in_their_own_direction(tmp_path: Path) -> None:
    by_word = replace(BACKWARD_TOKENS, unit=Unit.WORD)
    data = write_data_set(tmp_path, some_shards(), text_format=by_word)
    assert data.rows(16).window(0, 0).tolist() == data.frames[0][:17].tolist()


@QUICKLY
@given(
    shards=document_shards(),
    context_tokens=CONTEXTS,
    direction=DIRECTIONS,
    world_size=st.integers(1, 4),
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
        store, rows = data.store(), data.rows(context_tokens, direction)
        found = total(
            bigrams(batch)
            for rank in range(world_size)
            for batch in sequential_batches(store, rows, rank, world_size, micro_batch_rows)
        )
    flip = direction is Direction.FORWARD
    expected = total(learnable_bigrams(mirrored(frame) if flip else frame) for frame in data.frames)
    assert found == expected


@QUICKLY
@given(
    shards=document_shards(),
    context_tokens=CONTEXTS,
    world_size=st.integers(1, 4),
    micro_batch_rows=st.integers(1, 5),
)
def test_every_rank_gets_as_many_sequential_batches_of_the_same_shape(
    shards: list[list[Ids]], context_tokens: int, world_size: int, micro_batch_rows: int
) -> None:
    with data_set(shards) as data:
        store, rows = data.store(), data.rows(context_tokens)
        sizes = [
            [
                len(batch.ids_T)
                for batch in sequential_batches(store, rows, rank, world_size, micro_batch_rows)
            ]
            for rank in range(world_size)
        ]
    assert sizes == [sizes[0]] * world_size
    assert set(sizes[0]) == {micro_batch_rows * context_tokens}


def test_a_row_past_the_end_of_a_short_frame_has_no_targets(small: DataSet) -> None:
    last = len(small.frames) - 1
    rows = small.rows(16)
    assert len(small.frames[last]) < 48
    assert rows.batch(np.array([last]), np.array([3])).num_targets == 0


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 3), (2, 2), (3, 4), (12, 1)])
def test_ranks_and_micro_batches_change_nothing_in_a_step(
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


def test_a_step_can_be_asked_for_at_any_time(small: DataSet) -> None:
    training = small.training(small.store(), micro_batch_rows=12)
    in_turn = [training.at(step)[0].ids_T.tolist() for step in range(6)]
    assert [training.at(step)[0].ids_T.tolist() for step in reversed(range(6))] == in_turn[::-1]


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(5, 1), (2, 4), (12, 2)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers(
    small: DataSet, world_size: int, micro_batch_rows: int
) -> None:
    with pytest.raises(BatchError, match=rf"{world_size} ranks x {micro_batch_rows} .* 12"):
        small.training(small.store(), 0, world_size, micro_batch_rows)


def test_with_a_lane_a_rank_a_frame_is_decoded_once_an_epoch(
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
        FrameStore(small.folder, small.manifest, "val")


def test_more_shards_than_may_be_open_are_read_all_the_same(
    small: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.batches._OPEN_SHARDS", 1)
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
        lengths = [store.num_tokens(frame) for frame in range(store.num_frames)]
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
