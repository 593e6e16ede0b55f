"""Batches are a function of the step, independent of ranks, threads and restarts."""

from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loader import Stream
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.rows import IGNORED_TARGET
from data_pipeline.text.codec import Direction
from tests.helpers.batches import (
    BEGIN,
    END,
    FRAME_TOKENS,
    whole_frames,
)
from tests.helpers.loaders import (
    BATCH_ROWS,
    BRIEFLY,
    CORPORA,
    THREADS,
    WORLD_SIZES,
    Corpus,
    Reading,
    at_steps,
    joined,
    pairs_of_rows,
    readings,
    written,
)


@BRIEFLY
@given(described=CORPORA, world_size=WORLD_SIZES, epoch=st.integers(0, 3))
def test_batches_of_all_ranks_join_to_that_of_a_single_rank(
    described: tuple[Any, Reading], world_size: int, epoch: int
) -> None:
    with written(described) as corpus:
        step = corpus.near_an_epochs_end(epoch)
        assert corpus.step(step, world_size) == corpus.step(step)


@BRIEFLY
@given(described=CORPORA, threads=st.integers(1, 4), epoch=st.integers(0, 3))
def test_threads_do_not_change_the_batches(
    described: tuple[Any, Reading], threads: int, epoch: int
) -> None:
    with written(described) as corpus:
        first = corpus.near_an_epochs_end(epoch)
        steps = range(first, first + 6)
        with_threads = at_steps(corpus.training(threads=threads), steps)
        without = at_steps(corpus.training(), steps)
    assert [joined(of_step) for of_step in with_threads] == [joined(of_step) for of_step in without]


@BRIEFLY
@given(
    described=CORPORA, micro_batch_rows=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 9)
)
def test_micro_batches_are_the_batch_in_parts(
    described: tuple[Any, Reading], micro_batch_rows: int, step: int
) -> None:
    with written(described) as corpus:
        in_parts = corpus.training(micro_batch_rows=micro_batch_rows).at(step)
        assert joined(in_parts) == corpus.step(step)


@BRIEFLY
@given(
    described=CORPORA,
    epoch=st.integers(0, 3),
    offset=st.integers(0, 5),
    world_size=WORLD_SIZES,
    threads=THREADS,
)
def test_a_run_resumes_at_any_step_with_any_world_size(
    described: tuple[Any, Reading], epoch: int, offset: int, world_size: int, threads: int
) -> None:
    with written(described) as corpus:
        first = max(0, corpus.near_an_epochs_end(epoch) - 2)
        uninterrupted = at_steps(corpus.training(threads=1), range(first, first + 8))
        steps = range(first + offset, first + 8)
        of_ranks = [
            at_steps(corpus.training(rank, world_size, threads=threads), steps)
            for rank in range(world_size)
        ]
    found = [joined(chain.from_iterable(of_step)) for of_step in zip(*of_ranks, strict=True)]
    assert found == [joined(of_step) for of_step in uninterrupted[offset:]]


@BRIEFLY
@given(
    described=CORPORA,
    threads=THREADS,
    steps=st.lists(st.integers(0, 40), min_size=2, max_size=8),
)
def test_steps_may_be_read_in_any_order(
    described: tuple[Any, Reading], threads: int, steps: list[int]
) -> None:
    with written(described) as corpus:
        in_any_order = at_steps(corpus.training(threads=threads), steps)
        alone = [corpus.step(step) for step in steps]
    assert [joined(of_step) for of_step in in_any_order] == alone


@pytest.mark.parametrize("threads", [0, 3])
@settings(max_examples=6, deadline=None)
@given(data=st.data(), epoch=st.integers(0, 2), world_size=st.sampled_from([1, 2, 3, 8]))
def test_an_epoch_of_all_ranks_has_every_row_of_every_data_set_once(
    threads: int, data: st.DataObject, epoch: int, world_size: int
) -> None:
    frames = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    reading = replace(
        data.draw(readings(len(frames))),
        direction=Direction.BACKWARD,
        forward_share=None,
        are_whole=False,
    )
    with written(([whole_frames(num_frames, 4) for num_frames in frames], reading)) as corpus:
        expected = [Counter(np.concatenate(part.frames).tolist()) for part in corpus.data_sets]
        assert tokens_of_an_epoch(corpus, epoch, world_size, threads) == expected


def tokens_of_an_epoch(
    corpus: Corpus, epoch: int, world_size: int, threads: int
) -> list[Counter[int]]:
    """The ids that the ranks' batches hold of an epoch of each data set."""
    mixture, streams = corpus.reading.mixture, corpus.streams()
    steps = steps_of_an_epoch(mixture, streams, epoch)
    of_ranks = [
        at_steps(corpus.training(rank, world_size, threads=threads), steps)
        for rank in range(world_size)
    ]
    found: list[Counter[int]] = [Counter() for _ in streams]
    for step, of_step in zip(steps, zip(*of_ranks, strict=True), strict=True):
        ids = np.concatenate([batch.ids_T for batch in chain.from_iterable(of_step)])
        number = np.arange(step * BATCH_ROWS, (step + 1) * BATCH_ROWS)
        data_set, row = mixture.deal(number)
        for index, stream in enumerate(streams):
            places = stream.order.places_of(*np.divmod(row, stream.order.global_batch_rows))
            _, stored_row = stream.table.locate(places.frame, places.row)
            is_there = stored_row < FRAME_TOKENS // corpus.reading.context_tokens
            chosen = (data_set == index) & (places.epoch == epoch) & is_there
            for window in ids.reshape(BATCH_ROWS, -1)[chosen]:
                found[index].update(window.tolist())
    return found


def steps_of_an_epoch(mixture: Mixture, streams: list[Stream], epoch: int) -> range:
    numbers = []
    for index, stream in enumerate(streams):
        order = stream.order
        frame, row = np.divmod(np.arange(order.rows_per_epoch), order.rows_per_frame)
        step, position = order.find(np.full_like(frame, epoch), frame, row)
        numbers.append(mixture.number_of(index, step * order.global_batch_rows + position))
    every = np.concatenate(numbers) // BATCH_ROWS
    return range(int(every.min()), int(every.max()) + 1)


@BRIEFLY
@given(described=CORPORA, world_size=WORLD_SIZES, step=st.integers(0, 50))
def test_the_arrays_of_a_step_have_the_documented_types_and_shapes(
    described: tuple[Any, Reading], world_size: int, step: int
) -> None:
    with written(described) as corpus:
        context_tokens = corpus.reading.context_tokens
        batches = corpus.training(world_size - 1, world_size, micro_batch_rows=1).at(step)
    assert len(batches) == BATCH_ROWS // world_size
    for batch in batches:
        arrays = (batch.ids_T, batch.targets_T, batch.positions_T)
        assert [(str(one.dtype), one.shape) for one in arrays] == [("int64", (context_tokens,))] * 3
        assert str(batch.cu_seqlens.dtype) == "int32"
        assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, context_tokens)
        assert (np.diff(batch.cu_seqlens) > 0).all()


@BRIEFLY
@given(described=CORPORA, micro_batch_rows=st.sampled_from([1, 3, 8]), step=st.integers(0, 50))
def test_the_number_of_targets_is_that_of_those_not_ignored(
    described: tuple[Any, Reading], micro_batch_rows: int, step: int
) -> None:
    with written(described) as corpus:
        for batch in corpus.training(micro_batch_rows=micro_batch_rows).at(step):
            is_target = (batch.targets_T != IGNORED_TARGET).reshape(micro_batch_rows, -1)
            assert batch.num_targets == int(is_target.sum())
            if batch.is_forward_N is not None:
                assert batch.num_forward_targets == int(is_target[batch.is_forward_N].sum())


@BRIEFLY
@given(described=CORPORA, step=st.integers(0, 50), threads=THREADS)
def test_a_batch_read_in_the_other_direction_has_mirrored_targets_row_by_row(
    described: tuple[Any, Reading], step: int, threads: int
) -> None:
    """Target b of a becomes target mirror(a) of mirror(b)."""
    shards, reading = described
    taught = {}
    for direction in Direction:
        # Rows of whole documents read longer ones from another end.
        read_so = replace(reading, direction=direction, forward_share=None, are_whole=False)
        with written((shards, read_so)) as corpus:
            taught[direction] = pairs_of_rows(corpus.step(step, threads=threads), read_so)
    expected = [
        [(mirror(after), mirror(before)) for before, after in reversed(of_row)]
        for of_row in taught[Direction.BACKWARD]
    ]
    assert taught[Direction.FORWARD] == expected


def mirror(piece_id: int) -> int:
    return {BEGIN: END, END: BEGIN}.get(piece_id, piece_id)
