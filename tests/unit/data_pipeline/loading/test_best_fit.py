"""Best-fit packing: every document once, whole rows, full groups."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loading.best_fit import packed_groups

LENGTHS = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=120)


@given(
    lengths=LENGTHS,
    context_tokens=st.sampled_from([2, 16, 64]),
    rows=st.integers(1, 20),
    parts=st.integers(1, 4),
)
def test_groups_hold_every_document_in_order_and_no_row_holds_too_many_tokens(
    lengths: list[int], context_tokens: int, rows: int, parts: int
) -> None:
    given_parts = np.array_split(np.array(lengths), parts)
    groups = list(packed_groups(given_parts, context_tokens, rows))
    assert np.concatenate([group.lengths for group in groups]).tolist() == lengths
    for group in groups:
        sizes = np.minimum(group.lengths, context_tokens)
        filled = np.bincount(group.rows, sizes)
        assert group.num_rows <= rows
        assert filled.min() > 0
        assert filled.max() <= context_tokens
    whole = list(packed_groups([np.array(lengths)], context_tokens, rows))
    assert [one.rows.tolist() for one in whole] == [one.rows.tolist() for one in groups]


@given(lengths=LENGTHS, rows=st.integers(1, 8))
def test_a_group_ends_with_a_document_that_fits_none_of_its_rows(
    lengths: list[int], rows: int
) -> None:
    groups = list(packed_groups([np.array(lengths)], 32, rows))
    for group, following in pairwise(groups):
        room = 32 - np.bincount(group.rows, np.minimum(group.lengths, 32), rows)
        assert room.max() < min(following.lengths[0], 32)


def test_rows_of_documents_of_usual_lengths_are_nearly_full() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(5, 1, 20_000)).astype(np.int64) + 2
    groups = list(packed_groups([lengths], 1024, 256))
    positions = np.minimum(lengths, 1024).sum()
    rows = 256 * (len(groups) - 1) + groups[-1].num_rows
    assert positions / (1024 * rows) > 0.985
