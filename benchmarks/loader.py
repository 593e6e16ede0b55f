"""Throughput of training rows from shards, relative to peers and to the decompressor alone.

    taskset -c 1 python benchmarks/loader.py SHARDS [--context-tokens 1024] [--seconds 2]

Shuffled rows as int64 ids and targets (ours with positions): one process, CPU time of all its
threads, in turns, over whole rounds (ours: every frame of every lane's window, once). The bound
only decodes the same frames. Peers are included if installed, on the first `--peer-tokens` ids of
the same shards: mosaicml-streaming with zstd, litdata with uncompressed tokens, and nanoGPT's
random crops of a memory-mapped file. All files are in the page cache. SHARDS should hold several
times the tokens that are kept decoded, or decoding is not measured.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from smoke import Benchmark, is_installed

from data_pipeline.loading.document_index import DocumentIndex, open_document_index
from data_pipeline.loading.document_rows import DocumentRowReader
from data_pipeline.loading.frame_store import FrameStore, Ids
from data_pipeline.loading.loader import Stream, TrainingLoader
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.order import Order, choose_lanes
from data_pipeline.loading.row_grid import RowGrid
from data_pipeline.loading.rows import RowReader
from data_pipeline.shards.data_set import DataSet

_TURNS = 5
_MDS_SHARD_BYTES = 4 << 20


@dataclass
class Contender:
    """A contender."""

    start: Callable[[], Iterator[int]]
    """Iterator over the numbers of tokens that were just prepared."""
    round_tokens: int
    """Tokens per round, after which as many have been decoded as used."""


class Runner:
    """A contender in its own process, so that only its threads and memory are counted."""

    def __init__(self, contender: Contender, seconds: float) -> None:
        here, there = Pipe()
        self._pipe = here
        # Forked to avoid pickling; this process has no threads.
        self._process = get_context("fork").Process(
            target=_serve, args=(there, contender, seconds), daemon=True
        )
        self._process.start()
        self._pipe.recv()

    def turn(self) -> tuple[float, float]:
        """Tokens per CPU second, and the peak memory so far in MB."""
        self._pipe.send(None)
        measured: tuple[float, float] = self._pipe.recv()
        return measured

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, contender: Contender, seconds: float) -> None:
    tokens = contender.start()
    done = 0
    while done < contender.round_tokens:
        done += next(tokens)
    pipe.send(None)
    while True:
        pipe.recv()
        started, total, goal = time.process_time(), 0, contender.round_tokens
        while True:
            total += next(tokens)
            if total >= goal:
                elapsed = time.process_time() - started
                if elapsed >= seconds:
                    break
                goal += contender.round_tokens
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((total / elapsed, peak * 1024 / 1e6))


def stream_of(
    data_set: DataSet, context_tokens: int, batch_rows: int, *, of_documents: bool = False
) -> Stream:
    """Row stream of a run of one rank, as open_data makes it."""
    frames = FrameStore(data_set, "train")
    direction = data_set.manifest.text_format.direction
    frame_tokens = data_set.manifest.frame_tokens
    table: RowGrid | DocumentIndex
    window_frames = 8
    if of_documents:
        table = open_document_index(data_set, "train", context_tokens)
        rows: RowReader = DocumentRowReader(frames, table, direction)
        window_frames = table.window_groups(window_frames, frame_tokens)
    else:
        table = RowGrid(frames.shard_tokens, frame_tokens, context_tokens)
        rows = RowReader(frames, context_tokens, direction)
    lanes = choose_lanes(table.num_frames, batch_rows)
    order = Order(
        num_frames=table.num_frames,
        rows_per_frame=table.rows_per_frame,
        global_batch_rows=batch_rows,
        lanes=lanes,
        seed=0,
        window_frames=window_frames,
    )
    return Stream(rows, table, order)


def round_tokens_of(stream: Stream, context_tokens: int) -> int:
    """Tokens of a window of every lane."""
    order = stream.order
    return order.lanes * order.window_frames * order.rows_per_frame * context_tokens


def ours(stream: Stream) -> Iterator[int]:
    batch_rows = stream.order.global_batch_rows
    batches = TrainingLoader([stream], Mixture([1.0]), batch_rows, 0, 1, batch_rows, threads=1)
    step = 0
    try:
        while True:
            yield sum(len(batch.ids_T) for batch in batches.at(step))
            step += 1
    finally:
        batches.close()


def bare_decompression(data_set: DataSet) -> Iterator[int]:
    readers = [data_set.open_shard(entry) for entry in data_set.manifest.split("train")]
    while True:
        for reader in readers:
            for frame in range(reader.num_frames):
                yield len(reader.frame(frame))


def first_ids(data_set: DataSet, num_tokens: int) -> Ids:
    readers = (data_set.open_shard(entry) for entry in data_set.manifest.split("train"))
    parts: list[Ids] = []
    found = 0
    for reader in readers:
        for frame in range(reader.num_frames):
            parts.append(reader.frame(frame))
            found += len(parts[-1])
            if found >= num_tokens:
                return np.concatenate(parts)
    return np.concatenate(parts)


def nanogpt_crops(path: Path, id_dtype: str, context_tokens: int, rows: int) -> Iterator[int]:
    """nanoGPT's get_batch: stacked crops at random positions of a memory-mapped file."""
    generator = np.random.default_rng(0)
    while True:
        ids = np.memmap(path, dtype=id_dtype, mode="r")
        starts = generator.integers(len(ids) - context_tokens, size=rows).tolist()
        inputs = np.stack([ids[i : i + context_tokens].astype(np.int64) for i in starts])
        targets = np.stack([ids[i + 1 : i + 1 + context_tokens].astype(np.int64) for i in starts])
        assert inputs.shape == targets.shape
        yield inputs.size


def collated(rows: Iterator[Ids], batch_rows: int) -> Iterator[int]:
    """Inputs and targets of many rows at a time, computed in the cheapest way."""
    while True:
        windows = np.stack(list(islice(rows, batch_rows)))
        inputs, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
        assert inputs.shape == targets.shape
        yield inputs.size


def mosaic(folder: Path, ids: Ids, context_tokens: int) -> Iterator[Ids]:
    """Rows of mosaicml-streaming as bytes, the fastest encoding of MDS.

    Set up as for a corpus larger than the local cache: compressed shards in a `remote` (another
    folder here, so a download is a copy), decompressed into a `local` that holds at most a fifth
    of them and evicts the coldest. Shuffling (py1e) spans two shards, so each is copied,
    decompressed and written exactly once per epoch.
    """
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    remote, local = folder / "remote", folder / "local"
    with MDSWriter(
        out=str(remote),
        columns={"ids": "bytes"},
        compression="zstd:6",
        size_limit=_MDS_SHARD_BYTES,
    ) as writer:
        for start in range(0, len(ids) - context_tokens, context_tokens):
            writer.write({"ids": ids[start : start + context_tokens + 1].tobytes()})
    rows_a_shard = _MDS_SHARD_BYTES // (context_tokens * ids.itemsize)
    data_set = StreamingDataset(
        remote=str(remote),
        local=str(local),
        shuffle=True,
        shuffle_seed=0,
        shuffle_block_size=2 * rows_a_shard,
        num_canonical_nodes=1,
        batch_size=64,
        cache_limit=7 * _MDS_SHARD_BYTES,
    )
    while True:
        for row in data_set:
            yield np.frombuffer(row["ids"], dtype=ids.dtype)


def litdata(folder: Path, ids: Ids, context_tokens: int) -> Iterator[Ids]:
    """Memory-mapped chunks of uncompressed ids (litdata).

    Rows are shuffled within a whole chunk, over the same range as ours. The default range of 256
    rows fits into the processor's cache.
    """
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    loader = TokensLoader(block_size=context_tokens + 1)
    writer = BinaryWriter(str(folder), item_loader=loader, chunk_bytes="64MB")
    piece = 1 << 16
    for index, start in enumerate(range(0, len(ids), piece)):
        writer[index] = ids[start : start + piece]
    writer.done()
    writer.merge(1)
    data_set = StreamingDataset(
        str(folder), item_loader=loader, shuffle=True, item_shuffle_window="full"
    )
    while True:
        yield from data_set


def start_peer(
    peer: Callable[[Path, Ids, int], Iterator[Ids]],
    folder: Path,
    raw: Path,
    id_dtype: str,
    context_tokens: int,
    batch_rows: int,
) -> Iterator[int]:
    rows = peer(folder, np.memmap(raw, dtype=id_dtype, mode="r"), context_tokens)
    return collated(rows, batch_rows)


@click.command(
    cls=Benchmark,
    smoke="{shards} --context-tokens 16 --global-batch-rows 8 --seconds 0.01 --peer-tokens 20000",
)
@click.argument("shards")
@click.option("--context-tokens", default=1024, show_default=True, help="Tokens per row.")
@click.option(
    "--global-batch-rows", default=64, show_default=True, help="Rows per step over all ranks."
)
@click.option("--seconds", default=1.5, show_default=True, help="Minimum seconds per turn.")
@click.option(
    "--peer-tokens",
    default=60_000_000,
    show_default=True,
    help="Tokens of the data that peers read.",
)
def main(
    shards: str, context_tokens: int, global_batch_rows: int, seconds: float, peer_tokens: int
) -> None:
    """Print tokens per CPU second and peak memory of all contenders, medians over turns."""
    data_set = DataSet.open(shards)
    total = data_set.manifest.total("train")
    stream = stream_of(data_set, context_tokens, global_batch_rows)
    documents = stream_of(data_set, context_tokens, global_batch_rows, of_documents=True)
    order = stream.order
    window_frames = order.lanes * order.window_frames
    click.echo(
        f"numpy {np.__version__}, {total['tokens']:,} tokens in shards of "
        f"{total['file_bytes'] / (total['tokens'] * data_set.manifest.id_bytes):.3f} of the raw "
        f"ids: {order.num_frames:,} frames, of which some {window_frames:,} are in use at a time"
    )
    if order.num_frames < 4 * window_frames:
        click.echo("too few frames: many stay decoded between epochs")
    with TemporaryDirectory() as name:
        folder = Path(name)
        ids = first_ids(data_set, peer_tokens)
        raw = folder / "ids.bin"
        ids.tofile(raw)
        num_ids, id_dtype = len(ids), ids.dtype.str
        shape = (context_tokens, global_batch_rows)
        contenders = {
            "ours": Contender(lambda: ours(stream), round_tokens_of(stream, context_tokens)),
            "ours, whole documents": Contender(
                lambda: ours(documents), round_tokens_of(documents, context_tokens)
            ),
            "bound: bare decompression": Contender(
                lambda: bare_decompression(data_set), total["tokens"]
            ),
            "nanoGPT's crops, uncompressed": Contender(
                lambda: nanogpt_crops(raw, id_dtype, *shape), num_ids
            ),
        }
        del ids
        peers = {
            "litdata, uncompressed": (litdata, "litdata"),
            "mosaicml-streaming, zstd": (mosaic, "streaming"),
        }
        for title, (peer, module) in peers.items():
            if is_installed(title.split(",")[0], module):
                contenders[title] = Contender(
                    partial(start_peer, peer, folder / peer.__name__, raw, id_dtype, *shape),
                    num_ids,
                )
        runners = {title: Runner(contender, seconds) for title, contender in contenders.items()}
        try:
            turns = [{title: one.turn() for title, one in runners.items()} for _ in range(_TURNS)]
        finally:
            for runner in runners.values():
                runner.close()
    rates = {title: [turn[title][0] for turn in turns] for title in contenders}
    best = statistics.median(rates["ours"])
    click.echo(f"{'Mtok per CPU second':<30}median     min     max  ours / this  peak MB")
    for title, measured in rates.items():
        rate = statistics.median(measured)
        figures = "  ".join(f"{x / 1e6:6.1f}" for x in (rate, min(measured), max(measured)))
        click.echo(f"{title:<30}{figures}  {best / rate:11.2f}  {turns[-1][title][1]:7.0f}")


if __name__ == "__main__":
    main()
