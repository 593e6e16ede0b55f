"""Shards read in the other direction: the same windows from their other end, or a refusal."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given

from data_pipeline.errors import DirectionMismatchError
from data_pipeline.loading.rows import RowReader, format_read_as
from data_pipeline.text.codec import Direction, TextCodec, TextFormat, Unit
from tests.helpers.batches import (
    BACKWARD_TOKENS,
    CONTEXTS,
    FRAME_TOKENS,
    QUICKLY,
    DataSet,
    Ids,
    data_set,
    document_shards,
    mirrored,
    some_shards,
    write_data_set,
)

Codecs = Callable[..., TextCodec]


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


def test_reading_in_the_other_direction_does_not_change_the_stored_frames(small: DataSet) -> None:
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


def test_a_flipped_reader_has_its_direction(small: DataSet) -> None:
    rows = small.rows(16, Direction.FORWARD)
    assert rows.text_format == replace(BACKWARD_TOKENS, direction=Direction.FORWARD)


@pytest.mark.parametrize("stored", list(Direction))
def test_word_shards_cannot_be_reversed_and_both_directions_are_named(stored: Direction) -> None:
    (other,) = set(Direction) - {stored}
    with pytest.raises(DirectionMismatchError) as caught:
        format_read_as(TextFormat(stored, Unit.WORD, "5" * 64), other)
    message = str(caught.value)
    assert [name for name in ("'backward'", "'forward'", "'word'") if name not in message] == []


def test_word_shards_are_read_in_their_own_direction(tmp_path: Path) -> None:
    by_word = replace(BACKWARD_TOKENS, unit=Unit.WORD)
    data = write_data_set(tmp_path, some_shards(), text_format=by_word)
    assert data.rows(16).window(0, 0).tolist() == data.frames[0][:17].tolist()
