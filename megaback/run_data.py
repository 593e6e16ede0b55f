"""The data of a run: shards opened and checked against the config, order fixed, length known.

Loads no torch, so that the launcher can refuse what cannot work before any rank starts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.batches import (
    Batch,
    FrameStore,
    RowReader,
    TrainingBatches,
    sequential_batches,
)
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, choose_lanes
from data_pipeline.row_table import RowTable
from data_pipeline.text import TextCodec, TextFormat
from megaback.config import Config, split_batch


@dataclass(frozen=True)
class Data:
    """The rows of a run, as one rank sees them."""

    manifest: Manifest
    codec: TextCodec
    text_format: TextFormat
    order: Order
    training: TrainingBatches
    micro_batch_rows: int
    accumulation_steps: int
    total_steps: int
    _val: tuple[FrameStore, RowReader] | None

    @property
    def has_val(self) -> bool:
        return self._val is not None

    def validation(self, rank: int, world_size: int) -> Iterator[Batch]:
        """A rank's share of the whole val set."""
        if self._val is not None:
            frames, rows = self._val
            yield from sequential_batches(frames, rows, rank, world_size, self.micro_batch_rows)


def open_data(config: Config, rank: int, world_size: int) -> Data:
    """Open shards, check that they fit the config, and fix the order. Loads no weights."""
    folder = config.data.shards
    manifest = Manifest.load(folder)
    codec = manifest.codec(folder)
    frames = FrameStore(folder, manifest, "train")
    rows = RowReader(frames, config.batch.context_tokens, config.data.direction)
    table = RowTable(frames.shard_tokens, manifest.frame_tokens, config.batch.context_tokens)
    order = Order(
        num_frames=table.num_frames,
        rows_per_frame=table.rows_per_frame,
        global_batch_rows=config.batch.global_batch_rows,
        lanes=config.data.lanes or choose_lanes(table.num_frames, config.batch.global_batch_rows),
        seed=config.training.seed,
        window_frames=config.data.window_frames,
    )
    micro_batch_rows, accumulation_steps = split_batch(config.batch, world_size)
    training = TrainingBatches(frames, rows, table, order, rank, world_size, micro_batch_rows)
    val = None
    if manifest.split("val"):
        val_frames = FrameStore(folder, manifest, "val")
        val = (
            val_frames,
            RowReader(val_frames, config.batch.context_tokens, config.data.direction),
        )
    steps = config.training.steps
    if steps is None:
        epochs = config.training.epochs or 0.0
        steps = math.ceil(epochs * order.rows_per_epoch / order.global_batch_rows)
    return Data(
        manifest,
        codec,
        rows.text_format,
        order,
        training,
        micro_batch_rows,
        accumulation_steps,
        steps,
        val,
    )
