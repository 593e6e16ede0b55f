"""Rows of a model of both directions: which are forward, and what each row begins with."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DirectionMismatchError
from data_pipeline.loading.directions import are_forward, exchange
from data_pipeline.loading.loader import SequentialRows
from data_pipeline.loading.rows import IGNORED_TARGET, Batch, RowReader, format_read_as, pack
from data_pipeline.text.codec import Direction, TextFormat, Unit
from tests.helpers.batches import (
    BEGIN,
    CONTEXTS,
    END,
    FRAME_TOKENS,
    QUICKLY,
    Ids,
    data_set,
    document_shards,
)

SHARES = st.sampled_from([0.5, 0.3, 0.01, 0.9])


@given(step=st.integers(0, 1 << 40), rows=st.integers(1, 300), share=SHARES)
def test_every_step_has_the_share_within_one_row(step: int, rows: int, share: float) -> None:
    forward = are_forward(np.full(rows, step), np.arange(rows), share)

    assert abs(forward.sum() - share * rows) < 1


@given(position=st.integers(0, 300), share=SHARES)
def test_every_position_has_the_share_over_the_steps(position: int, share: float) -> None:
    steps = np.arange(1000)

    forward = are_forward(steps, np.full(1000, position), share)

    assert forward.mean() == pytest.approx(share, abs=0.005)


def exchanged(ids: Ids) -> Ids:
    ids = ids.copy()
    exchange(ids, BEGIN, END)
    return ids


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS)
def test_rows_of_both_are_those_of_one_direction_behind_their_marker(
    shards: list[list[Ids]], context_tokens: int
) -> None:
    """Rows of one direction, but for the first id and target of a row that cuts a document."""
    with data_set(shards) as data:
        both = RowReader(data.store(), context_tokens, Direction.BACKWARD, both=True)
        num_rows = len(data.frames) * FRAME_TOKENS // context_tokens
        frame, row = np.divmod(np.arange(num_rows), FRAME_TOKENS // context_tokens)
        for direction, marker in ((Direction.BACKWARD, BEGIN), (Direction.FORWARD, END)):
            single = data.rows(context_tokens, direction).batch(frame, row)
            is_forward = np.full(num_rows, direction is Direction.FORWARD)
            found = packed(both, frame, row, is_forward)
            ids, targets = single.ids_T, single.targets_T
            if direction is Direction.FORWARD:
                ids, targets = exchanged(ids), exchanged(targets)
            firsts = np.arange(0, len(ids), context_tokens)
            is_cut = ids[firsts] != marker
            ids[firsts], targets[firsts[is_cut]] = marker, IGNORED_TARGET
            assert found.ids_T.tolist() == ids.tolist()
            assert found.targets_T.tolist() == targets.tolist()
            assert found.cu_seqlens.tolist() == single.cu_seqlens.tolist()
            assert (found.ids_T[found.cu_seqlens[:-1]] == marker).all()


def packed(reader: RowReader, frame: Ids, row: Ids, is_forward: Ids) -> Batch:
    rows = reader.read(frame, row, is_forward)
    return pack(rows, reader.begin_id, reader.end_id, len(frame))[0]


@QUICKLY
@given(shards=document_shards(), context_tokens=CONTEXTS, world_size=st.sampled_from([1, 2, 3]))
def test_validation_reads_every_row_once_in_each_direction(
    shards: list[list[Ids]], context_tokens: int, world_size: int
) -> None:
    with data_set(shards) as data:
        reader = RowReader(data.store(), context_tokens, Direction.BACKWARD, both=True)
        read: list[tuple[bool, list[int]]] = []
        for rank in range(world_size):
            dealt = SequentialRows([reader], rank, world_size, 1)
            for batch in dealt.slices(0, dealt.num_rows, 1, 1):
                assert batch.is_forward_N is not None
                if batch.num_targets:
                    read.append((bool(batch.is_forward_N[0]), batch.ids_T.tolist()))
        num_rows = len(data.frames) * FRAME_TOKENS // context_tokens
        frame, row = np.divmod(np.arange(num_rows), FRAME_TOKENS // context_tokens)
        expected = [
            (is_forward, one.ids_T.tolist())
            for is_forward in (False, True)
            for one in packed(reader, frame, row, np.full(num_rows, is_forward)).rows(
                context_tokens
            )
            if one.num_targets
        ]
        assert sorted(read) == sorted(expected)


def test_word_shards_are_refused_with_what_to_do() -> None:
    words = TextFormat(Direction.BACKWARD, Unit.WORD, "5" * 64)

    with pytest.raises(DirectionMismatchError, match=r"'both'.*in unit 'word'.*--unit token"):
        format_read_as(words, Direction.BACKWARD, both=True)
