"""Notes of staged documents: packed as read, up to the limits."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task_input import Passed
from data_pipeline.build.task_output import DOCUMENT_NOTE, Notes

DOCUMENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), max_size=30)
LIMITS = st.none() | st.integers(1, 20)


def passed(number: int, pass_number: int = 0) -> Passed:
    text = str(number)
    sha256 = hashlib.sha256(text.encode()).digest()
    return Passed(
        text=text,
        response=None,
        num_bytes=len(text),
        sha256=sha256,
        pass_number=pass_number,
        split=None,
        position="",
    )


@given(
    documents=DOCUMENTS,
    limit_documents=LIMITS,
    limit_tokens=LIMITS,
    deduplicate=st.booleans(),
)
def test_notes_end_with_the_document_that_reaches_a_limit(
    documents: list[tuple[int, int]],
    limit_documents: int | None,
    limit_tokens: int | None,
    deduplicate: bool,
) -> None:
    settings = BuildSettings(
        (),
        "5" * 64,
        limit_documents=limit_documents,
        limit_tokens=limit_tokens,
        deduplicate=deduplicate,
    )
    notes = Notes(settings)
    seen: set[int] = set()
    num_documents = num_tokens = 0
    for number, tokens in documents:
        if not (deduplicate and number in seen):
            num_documents += 1
            num_tokens += tokens
            is_new = True
        else:
            is_new = False
        seen.add(number)
        is_enough = is_new and (
            num_documents >= (limit_documents or 10**9) or num_tokens >= (limit_tokens or 10**9)
        )
        assert notes.add(0, tokens, passed(number)) == is_enough


@given(DOCUMENTS)
def test_notes_distinguish_texts_and_passes(documents: list[tuple[int, int]]) -> None:
    notes = Notes(BuildSettings((), "5" * 64, deduplicate=True))
    for number, tokens in documents:
        for pass_number in (0, 1):
            notes.add(pass_number, tokens, passed(number, pass_number))
    found = np.frombuffer(bytes(notes.packed), dtype=DOCUMENT_NOTE)
    assert found["tokens"].tolist() == [tokens for _, tokens in documents for _ in (0, 1)]
    assert found["split"].tolist() == [0, 1] * len(documents)
    assert (found["text_bytes"] == 1).all()
    keys = {*zip(found["high"].tolist(), found["low"].tolist(), strict=True)}
    assert len(keys) == 2 * len({number for number, _ in documents})
