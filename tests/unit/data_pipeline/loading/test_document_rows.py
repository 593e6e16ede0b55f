"""Rows of whole documents: each document once, from its beginning in reading order, in one row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loading.document_index import open_document_index
from data_pipeline.loading.document_rows import DocumentRowReader
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from data_pipeline.text.codec import Direction
from tests.helpers.batches import (
    BEGIN,
    CONTEXTS,
    DIRECTIONS,
    END,
    QUICKLY,
    Ids,
    data_set,
    document_shards,
    mirrored,
    some_shards,
)
from tests.helpers.loaders import BATCH_ROWS, Corpus, Reading, at_steps


def reader_of(store: FrameStore, context_tokens: int, direction: Direction) -> DocumentRowReader:
    index = open_document_index(store.data_set, "train", context_tokens)
    return DocumentRowReader(store, index, direction)


def every_row(reader: DocumentRowReader) -> Batch:
    totals = reader.index.totals
    frame, row = np.divmod(np.arange(totals.groups * totals.rows_per_group), totals.rows_per_group)
    return reader.batch(frame, row)


def texts_of(batch: Batch, context_tokens: int) -> list[tuple[int, ...]]:
    """Ids and targets of every segment with targets, as one text of each."""
    texts = []
    for row in batch.rows(context_tokens):
        for start, stop in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True):
            ids, targets = row.ids_T[start:stop], row.targets_T[start:stop]
            number = int(np.count_nonzero(targets != IGNORED_TARGET))
            if number:
                assert ids[1:number].tolist() == targets[: number - 1].tolist()
                assert (targets[number:] == IGNORED_TARGET).all()
                assert (ids[number + 1 :] == END).all()
                texts.append((*ids[:number].tolist(), int(targets[number - 1])))
    return texts


@QUICKLY
@given(
    shards=document_shards(),
    context_tokens=CONTEXTS,
    direction=DIRECTIONS,
    keep_frames=st.sampled_from([1, 64]),
)
def test_rows_hold_the_beginning_of_every_document_once_and_nothing_else(
    shards: list[list[Ids]], context_tokens: int, direction: Direction, keep_frames: int
) -> None:
    with data_set(shards) as data:
        reader = reader_of(data.store(keep_frames), context_tokens, direction)
        batch = every_row(reader)
        totals = reader.index.totals
    documents = [document for of_shard in shards for document in of_shard]
    if direction is not Direction.BACKWARD:
        documents = [mirrored(document) for document in documents]
    beginnings = [tuple(document[: context_tokens + 1].tolist()) for document in documents]
    assert sorted(texts_of(batch, context_tokens)) == sorted(beginnings)
    assert batch.num_targets == sum(len(one) - 1 for one in beginnings)
    assert totals.documents == len(documents)
    assert totals.tokens == sum(map(len, documents))
    assert totals.used_tokens == sum(map(len, beginnings))
    assert totals.cut_documents == sum(len(one) > context_tokens + 1 for one in documents)
    assert (batch.ids_T[batch.cu_seqlens[:-1]] == BEGIN).mean() >= len(documents) / len(
        batch.cu_seqlens[:-1]
    )


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS)
def test_rows_of_both_directions_have_as_many_documents_and_targets(
    shards: list[list[Ids]], context_tokens: int
) -> None:
    with data_set(shards) as data:
        found = [
            [
                (row.num_targets, len(row.cu_seqlens))
                for row in every_row(reader_of(data.store(), context_tokens, direction)).rows(
                    context_tokens
                )
            ]
            for direction in Direction
        ]
    assert found[0] == found[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_an_epoch_of_any_number_of_ranks_with_a_restart_has_every_document_once(
    world_size: int,
) -> None:
    reading = Reading(are_whole=True, lanes=[2], lane_rows=[12], window_frames=8)

    def epochs(corpus: Corpus) -> list[tuple[int, ...]]:
        order = corpus.streams()[0].order
        # A number of epochs that is a whole number of steps.
        steps = np.lcm(order.rows_per_epoch, BATCH_ROWS) // BATCH_ROWS
        found: list[tuple[int, ...]] = []
        for part in (range(steps // 3), range(steps // 3, steps)):
            for rank in range(world_size):
                for batches in at_steps(corpus.training(rank, world_size), part):
                    for batch in batches:
                        found += texts_of(batch, reading.context_tokens)
        assert len(found) % (steps * BATCH_ROWS // order.rows_per_epoch) == 0
        return found

    shards = some_shards()
    with data_set(shards) as data:
        corpus = Corpus([data], reading)
        rows_per_epoch = corpus.streams()[0].order.rows_per_epoch
        found = epochs(corpus)
    documents = [tuple(one[:17].tolist()) for of_shard in shards for one in of_shard]
    times = np.lcm(rows_per_epoch, BATCH_ROWS) // rows_per_epoch
    assert sorted(found) == sorted(documents * times)


def test_a_row_with_a_frame_that_cannot_be_read_is_skipped_and_counted() -> None:
    with data_set(some_shards()) as data:
        intact = every_row(reader_of(data.store(), 16, Direction.BACKWARD))
        data.damage(0)
        reader = reader_of(data.store(skip_bad_frames=True), 16, Direction.BACKWARD)
        batch = every_row(reader)
    assert 0 < batch.num_skipped_rows < 8
    kept = set(texts_of(batch, 16))
    assert kept < set(texts_of(intact, 16))
    # Documents of the damaged frame are missing: the first one is in it.
    assert tuple(some_shards()[0][0][:17].tolist()) not in kept


@pytest.mark.parametrize("keep_frames", [1, 2, 64])
def test_spans_of_frames_are_joined_however_few_frames_are_kept(keep_frames: int) -> None:
    with data_set(some_shards()) as data:
        frame, start, stop = (
            np.array(part) for part in ([0, 2, 1, 0], [3, 0, 60, 0], [9, 64, 64, 1])
        )
        found = data.store(keep_frames).spans(frame, start, stop)
    expected = [data.frames[f][a:b] for f, a, b in zip(frame, start, stop, strict=True)]
    assert found.tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("threads", [1, 3])
def test_frames_are_decoded_about_once_per_epoch_also_ahead_of_time(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = FrameStore._decode

    def counted(store: FrameStore, frame: int) -> object:
        decoded.append(frame)
        return decode(store, frame)

    monkeypatch.setattr(FrameStore, "_decode", counted)
    generator = np.random.default_rng(0)
    documents = [
        np.array([BEGIN, *[5] * length, END]) for length in generator.integers(1, 14, 5000)
    ]
    reading = Reading(are_whole=True, lanes=[4], lane_rows=[6], window_frames=1)
    with data_set([documents]) as data:
        corpus = Corpus([data], reading)
        order = corpus.streams()[0].order
        assert order.num_frames >= 4 * order.lanes
        at_steps(corpus.training(threads=threads), range(order.rows_per_epoch // BATCH_ROWS))
        assert len(decoded) < 1.2 * len(data.frames)
