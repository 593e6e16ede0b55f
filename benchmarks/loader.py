"""How fast training rows come out of shards, against bare decompression of the same frames.

    python benchmarks/loader.py SHARDS [--context-tokens 1024] [--seconds 5]

One process, CPU time. The bound decodes the same frames and does nothing else.
"""

import time
from pathlib import Path

import click
import numpy as np

from data_pipeline.batches import FrameStore, RowReader, TrainingBatches
from data_pipeline.manifest import Manifest
from data_pipeline.order import Order, choose_lanes
from data_pipeline.row_table import RowTable


@click.command()
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--context-tokens", default=1024, show_default=True)
@click.option("--global-batch-rows", default=64, show_default=True)
@click.option("--seconds", default=5.0, show_default=True)
def main(shards: Path, context_tokens: int, global_batch_rows: int, seconds: float) -> None:
    """Print tokens per CPU-second of our rows and of bare decompression, and their ratio."""
    manifest = Manifest.load(shards)
    frames = FrameStore(shards, manifest, "train")
    rows = RowReader(frames, context_tokens, manifest.text_format.direction)
    table = RowTable(frames.shard_tokens, manifest.frame_tokens, context_tokens)
    lanes = choose_lanes(table.num_frames, global_batch_rows)
    order = Order(table.num_frames, table.rows_per_frame, global_batch_rows, lanes, seed=0)
    batches = TrainingBatches(frames, rows, table, order, 0, 1, global_batch_rows)

    started, step, tokens = time.process_time(), 0, 0
    while time.process_time() - started < seconds:
        (batch,) = batches.at(step)
        tokens += len(batch.ids_T)
        step += 1
    ours = tokens / (time.process_time() - started)

    bare = FrameStore(shards, manifest, "train", keep_frames=1)
    started, tokens, rounds = time.process_time(), 0, 0
    while time.process_time() - started < seconds:
        for frame in range(bare.num_frames):
            tokens += len(bare.frame(frame))
        rounds += 1
    bound = tokens / (time.process_time() - started)

    click.echo(
        f"numpy {np.__version__}, {manifest.total('train')['tokens']:,} tokens, {lanes} lanes"
    )
    click.echo(f"rows of {context_tokens}, shuffled, int64: {ours / 1e6:8.1f} Mtok per CPU-second")
    click.echo(f"bare decompression:               {bound / 1e6:8.1f} Mtok per CPU-second")
    click.echo(f"ratio                             {ours / bound:8.2f}")


if __name__ == "__main__":
    main()
