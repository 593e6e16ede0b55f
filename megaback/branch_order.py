"""Continuation of a trunk's data order and count of steps by its branch, by arithmetic alone.

The rows of a lane do not depend on the batch. A branch with another batch therefore continues every
lane where the trunk left it, if the trunk's lanes divide the new batch. Loads no torch.
"""

from data_pipeline.errors import BatchError, ConfigError, RunMismatchError
from data_pipeline.text.codec import TextFormat
from megaback.branches import BranchPoint
from megaback.config import TrainingSection
from megaback.config_batch import BatchSection


def whole_steps(branch: BranchPoint, batch: BatchSection) -> int:
    """Steps of the batch that take at least the rows that were read before a branch."""
    return -(-branch.rows // batch.global_batch_rows)


def require_whole_lanes(
    branch: BranchPoint, batch_rows: int, lanes: int, *, is_mixture: bool
) -> None:
    """Raises BatchError if a branch cannot continue the order with another batch."""
    restart = f"or restart the data: {branch.without('data')}"
    if is_mixture:
        raise BatchError(
            f"batch.global_batch_rows is {batch_rows}, but the trunk has read its mixture in "
            f"batches of {branch.order_rows} rows, and the parts of a mixture do not end together; "
            f"use {branch.order_rows} rows, {restart}"
        )
    if batch_rows % lanes:
        raise BatchError(
            f"batch.global_batch_rows {batch_rows} is not divisible by the trunk's {lanes} lanes; "
            f"use a multiple of {lanes}, {restart}"
        )


def require_same_data(
    branch: BranchPoint, fingerprint: str, text_format: TextFormat, shards: str
) -> None:
    """Raises RunMismatchError, or an error of text formats, for data that a trunk does not fit."""
    where = f"branch_from {branch.checkpoint}"
    base = TextFormat.from_dict(branch.text_format)
    base.as_base_of(text_format).require_same(text_format, where, f"the run on {shards}")
    if branch.continues("data") and branch.data_fingerprint != fingerprint:
        raise RunMismatchError(
            f"{where} has read shards {branch.data_fingerprint[:12]}, but {shards} has "
            f"{fingerprint[:12]}; use the same shards and weights, or restart the data: "
            f"{branch.without('data')}"
        )


def require_steps_left(branch: BranchPoint, training: TrainingSection, steps: int | None) -> None:
    """Raises ConfigError if a branch that ends after `steps` steps has none of its own."""
    if steps is None or steps > branch.step:
        return
    key, value = (
        ("steps", training.steps) if training.epochs is None else ("epochs", training.epochs)
    )
    raise ConfigError(
        f"training.{key} {value:g} ends at step {steps:,}, and the trunk of the branch has done "
        f"{branch.step:,} ({branch.checkpoint}); raise training.{key}, or count steps from 0: "
        f"{branch.without('schedule')}"
    )
