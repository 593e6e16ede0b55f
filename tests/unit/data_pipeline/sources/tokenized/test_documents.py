"""Cutting streams at end ids, and the checks of documents."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import BadRecordError, ConfigError
from data_pipeline.sources.tokenized.documents import (
    AnyIds,
    DocumentChecker,
    RawDocument,
    TokenizedFormat,
    cut,
)
from tests.helpers.builds import Codecs

END = 9
DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=8)


def chunks_of(ids: Sequence[int], start: int, size: int) -> Iterator[AnyIds]:
    yield from (np.array(ids[at : at + size]) for at in range(start, len(ids), size))


@given(
    DOCUMENTS,
    st.lists(st.integers(0, 60), max_size=4),
    st.integers(1, 7),
    st.booleans(),
    st.booleans(),
)
def test_slices_of_a_stream_hold_every_document_once(
    documents: list[list[int]], bounds: list[int], size: int, is_before: bool, has_last_end: bool
) -> None:
    """Wherever slices and chunks end, and whether end ids are before or after documents."""
    ids = [i for each in documents for i in ((END, *each) if is_before else (*each, END))]
    if not is_before and not has_last_end:
        ids = ids[:-1]
        if not documents[-1]:
            documents = documents[:-1]
    elif is_before and not documents[-1]:
        documents = documents[:-1]  # nothing follows the last end id
    cuts = sorted({0, len(ids), *(bound for bound in bounds if bound < len(ids))})
    found: list[tuple[int, list[int]]] = []
    for start, stop in itertools.pairwise(cuts):
        begins_within = start > 0 and ids[start - 1] != END
        for first, of_document in cut(
            chunks_of(ids, start, size),
            END,
            lambda stop=stop: stop,
            100,  # type: ignore[misc]
            position=start,
            skips_first=begins_within,
        ):
            assert of_document is not None
            assert start <= first < max(stop, 1)
            found.append((first, of_document.tolist()))
    if not is_before and documents and not documents[0] and ids[:1] == [END]:
        documents = documents[1:]  # an end id at the beginning belongs to what follows
    assert [each for _, each in found] == documents


def test_a_document_that_is_too_long_is_not_held_and_the_next_one_is_read() -> None:
    ids = [1, 2, 3, 4, 5, END, 6, END]
    found = list(cut(chunks_of(ids, 0, 2), END, lambda: 8, 4))
    assert [(start, None if each is None else each.tolist()) for start, each in found] == [
        (0, None),
        (6, [6]),
    ]


def checker_of(codec: Codecs, max_bytes: int = 1 << 20) -> tuple[DocumentChecker, list[int]]:
    ids = codec().ids_of(codec().encode_document("the cat sat. ")).tolist()
    form = TokenizedFormat(end_id=codec().end_id, begin_id=codec().begin_id)
    return DocumentChecker(form, codec(), max_bytes), ids


def test_markers_are_removed_and_the_text_of_ids_is_known(codec: Codecs) -> None:
    checker, ids = checker_of(codec)
    raws = [
        RawDocument(np.array(each), "a.bin")
        for each in (ids, [*ids, codec().end_id], [codec().begin_id, *ids, codec().end_id])
    ]
    for document in checker.documents(raws, pytest.fail):
        assert document.tokenized is not None
        assert document.tokenized.ids.tolist() == ids
        assert document.content == b"the cat sat. "


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8", "<u8"])
@pytest.mark.parametrize(("position", "change"), [(1, "large"), (0, "large"), (2, "negative")])
def test_an_id_outside_the_vocabulary_is_named(
    codec: Codecs, dtype: str, position: int, change: str
) -> None:
    checker, ids = checker_of(codec)
    array = np.array(ids, dtype)
    array[position] = 600 if change == "large" else np.array(-1).astype(dtype)
    with pytest.raises(BadRecordError, match=rf"a\.bin: id .* at its token {position} is outside"):
        list(checker.documents([RawDocument(array, "a.bin")], raising))


def raising(error: BadRecordError) -> None:
    raise error


def test_an_id_without_text_is_named_with_the_option_for_it(codec: Codecs) -> None:
    checker, ids = checker_of(codec)
    chat_id = codec().chat_ids["<|im_end|>"]
    for bad, advice in ((chat_id, f"set `end_id` to {chat_id}"), (codec().end_id, "`joined`")):
        raw = RawDocument(
            np.array([codec().begin_id, *ids[:2], bad, *ids[2:]]), "a.bin: document 7"
        )
        with pytest.raises(
            BadRecordError, match=r"document 7: id .* at its token 3 has no text"
        ) as e:
            list(checker.documents([raw], raising))
        assert advice in str(e.value)


def test_a_loss_mask_is_refused_unless_it_is_whole(codec: Codecs) -> None:
    checker, ids = checker_of(codec)
    mask = np.ones(len(ids), np.uint8)
    whole = RawDocument(np.array(ids), "a.ds: document 0", mask.copy())
    mask[2] = 0
    masked = RawDocument(np.array(ids), "a.ds: document 1", mask)
    errors: list[BadRecordError] = []
    assert len(list(checker.documents([whole, masked], errors.append))) == 1
    assert "a.ds: document 1: no loss on its token 2" in str(errors[0])


def test_a_document_of_too_much_text_is_a_malformed_record(codec: Codecs) -> None:
    checker, ids = checker_of(codec, 5)
    with pytest.raises(BadRecordError, match=r"longer than `max_record_bytes` 5"):
        list(checker.documents([RawDocument(np.array(ids), "a.bin")], raising))


def test_a_marker_with_text_would_be_lost(codec: Codecs) -> None:
    piece_id = int(np.flatnonzero(codec().piece_num_bytes())[0])
    with pytest.raises(ConfigError, match=r"`end_id` is .*, which has the text"):
        DocumentChecker(TokenizedFormat(end_id=piece_id, begin_id=1), codec(), 100)


@pytest.mark.parametrize("wrong", [{"end_id": -1}, {"begin_id": 1 << 32}, {"flat_type": "float32"}])
def test_a_format_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        TokenizedFormat(**{"end_id": 0, "begin_id": 1, **wrong})  # type: ignore[arg-type]
