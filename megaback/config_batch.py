"""Section `batch` of the config, and its division among ranks. Loads no torch."""

from typing import Annotated

from pydantic import model_validator

from data_pipeline.common import number_ranges as ranges
from data_pipeline.errors import BatchError
from megaback.config_section import Section


class BatchSection(Section):
    context_tokens: Annotated[int, ranges.CONTEXT]
    """Length of a row, in tokens; divides the frames of the shards."""
    global_batch_rows: Annotated[int, ranges.SIZE]
    """Number of rows per step, over all ranks and accumulation steps."""
    micro_batch_rows: Annotated[int, ranges.SIZE]
    """Maximum number of rows per forward pass. The largest divisor of a rank's rows is used, with
    gradient accumulation for the rest."""
    sequence_parallel: Annotated[int, ranges.SIZE] = 1
    """Number of consecutive ranks that share the same rows, each with an equal part of every row:
    activations divided by it, for long contexts. Divides the ranks, context_tokens and
    model.num_heads."""

    @model_validator(mode="after")
    def _equal_parts(self) -> "BatchSection":
        if self.context_tokens % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} does not divide context_tokens "
                f"{self.context_tokens}; use a power of two that does"
            )
        return self

    @property
    def part_tokens(self) -> int:
        """Tokens of a rank's part of a row."""
        return self.context_tokens // self.sequence_parallel

    def shown_ranks(self, ranks: int) -> str:
        """The ranks by whose number the rows of a micro-batch are multiplied."""
        parts = self.sequence_parallel
        return f"{ranks} ranks" if parts == 1 else f"{ranks // parts} groups of {parts} ranks"

    def row_groups(self, ranks: int) -> int:
        """Number of groups of ranks that read rows of their own. Raises BatchError."""
        if ranks % self.sequence_parallel:
            raise BatchError(
                f"batch.sequence_parallel {self.sequence_parallel} does not divide {ranks} ranks; "
                "use a divisor of them or another number of ranks"
            )
        return ranks // self.sequence_parallel


def unequal_heads(batch: BatchSection, num_heads: int, kv_heads: int) -> str | None:
    """Reason why attention heads cannot be divided among the ranks of a group; None if they can.

    Key and value heads that are fewer than the ranks are repeated.
    """
    parts = batch.sequence_parallel
    for key, heads, is_unequal in (
        ("num_heads", num_heads, num_heads % parts > 0),
        ("num_kv_heads", kv_heads, kv_heads % parts > 0 and parts % kv_heads > 0),
    ):
        if is_unequal:
            return (
                f"batch.sequence_parallel is {parts} and model.{key} is {heads}, and every rank "
                "needs equally many heads; use a divisor of model.num_heads that divides "
                "model.num_kv_heads or is a multiple of it"
            )
    return None


def split_batch(batch: BatchSection, ranks: int) -> tuple[int, int]:
    """Rows per micro-batch, and accumulation steps, of each rank.

    Raises BatchError when the global batch is not divisible by the ranks, or by their groups.
    """
    rows, groups = batch.global_batch_rows, batch.row_groups(ranks)
    if rows % groups:
        nearest = max(groups, round(rows / groups) * groups)
        parts = batch.sequence_parallel
        shared = f" of batch.sequence_parallel {parts}" if parts > 1 else ""
        raise BatchError(
            f"batch.global_batch_rows {rows} is not divisible by "
            f"{f'{groups} groups{shared}' if shared else f'{ranks} ranks'}; "
            f"use {nearest} rows or another number of ranks"
        )
    group_rows = rows // groups
    micro_rows = next(
        size
        for size in range(min(batch.micro_batch_rows, group_rows), 0, -1)
        if group_rows % size == 0
    )
    return micro_rows, group_rows // micro_rows
