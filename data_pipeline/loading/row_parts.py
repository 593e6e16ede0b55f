"""Equal parts of every row, each for one of the ranks that share the rows.

Targets, positions and segments are those of the whole rows, so that a row's parts together have all
its targets, and those at their borders are the first ids of the next part.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from data_pipeline.loading.directions import IGNORED_TARGET
from data_pipeline.loading.rows import Batch, Indices

_Packed = TypeVar("_Packed")


@dataclass(frozen=True)
class RowPart:
    """One of `count` contiguous parts of every row."""

    number: int = 0
    count: int = 1

    def of(self, values_T: _Packed, num_rows: int) -> _Packed:
        """This part of each row's values, in an array of NumPy or a tensor of PyTorch."""
        packed_T: Any = values_T
        part: _Packed = packed_T.reshape(num_rows, self.count, -1)[:, self.number].reshape(-1)
        return part

    def of_batch(self, batch: Batch, context_tokens: int) -> Batch:
        """This part of each row of a batch; skipped rows are counted in the first part."""
        if self.count == 1:
            return batch
        num_rows = len(batch.ids_T) // context_tokens
        targets_T = self.of(batch.targets_T, num_rows)
        targets_N = (targets_T.reshape(num_rows, -1) != IGNORED_TARGET).sum(axis=1)
        is_forward_N = batch.is_forward_N
        return PartialBatch(
            ids_T=self.of(batch.ids_T, num_rows),
            targets_T=targets_T,
            cu_seqlens=batch.cu_seqlens,
            num_targets=int(targets_N.sum()),
            num_skipped_rows=0 if self.number else batch.num_skipped_rows,
            is_forward_N=is_forward_N,
            num_forward_targets=0 if is_forward_N is None else int(targets_N[is_forward_N].sum()),
            num_rows=num_rows,
            part=self,
        )


@dataclass(frozen=True, kw_only=True)
class PartialBatch(Batch):
    """A part of each row: ids and targets of T tokens, and segments of the whole rows."""

    num_rows: int
    part: RowPart

    @property
    def positions_T(self) -> Indices:  # noqa: N802 - named as the arrays are
        """Positions within the segments of the whole rows."""
        return self.part.of(super().positions_T, self.num_rows)
