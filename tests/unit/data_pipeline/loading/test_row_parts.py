"""Parts of rows: together they are the whole rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from data_pipeline.loading.loader import sequential_batches
from data_pipeline.loading.row_parts import RowPart
from data_pipeline.loading.rows import Batch
from tests.helpers.batches import CONTEXT_TOKENS, QUICKLY, Ids, data_set, document_shards

ROWS = 3


def parts_of(batch: Batch, count: int) -> list[Batch]:
    return [RowPart(number, count).of_batch(batch, CONTEXT_TOKENS) for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@QUICKLY
@given(shards=document_shards())
def test_the_parts_of_rows_side_by_side_are_the_rows(shards: list[list[Ids]], count: int) -> None:
    with data_set(shards) as data:
        batch = next(sequential_batches(data.rows(CONTEXT_TOKENS), 0, 1, ROWS))
    batch = replace(batch, is_forward_N=np.array([True, False, True]), num_skipped_rows=1)

    parts = parts_of(batch, count)

    for name in ("ids_T", "targets_T", "positions_T"):
        by_part = [getattr(part, name).reshape(ROWS, -1) for part in parts]
        assert np.concatenate(by_part, axis=1).ravel().tolist() == getattr(batch, name).tolist()
    assert all(part.cu_seqlens.tolist() == batch.cu_seqlens.tolist() for part in parts)
    assert sum(part.num_targets for part in parts) == batch.num_targets
    assert sum(part.num_skipped_rows for part in parts) == 1
    forward = (batch.targets_T.reshape(ROWS, -1)[[0, 2]] >= 0).sum()
    if count > 1:
        assert sum(part.num_forward_targets for part in parts) == forward
