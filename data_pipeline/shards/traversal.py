"""Iteration over the shards of a data set on threads, and even samples of frames.

Decompression, compression, hashing and reading release the GIL, so threads suffice, and no data is
sent to other processes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from data_pipeline.shards.manifest import Manifest, ShardEntry

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def on_threads(
    work: Callable[[_Item], _Result], items: Iterable[_Item], workers: int | None, label: str
) -> Iterator[tuple[_Item, _Result]]:
    """Yield every item with its result, in the order in which they finish.

    `workers` None is one per core. The first exception cancels the work that has not begun. On a
    terminal, a bar with `label` shows the number of finished items.
    """
    console = SafeConsole(stderr=True)
    columns = (*SafeProgress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        # Without a terminal, a bar would print an empty line.
        with SafeProgress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            running = {pool.submit(work, item): item for item in items}
            bar = progress.add_task(label, total=len(running))
            for future in as_completed(running):
                # Removed, so that results do not accumulate in memory.
                yield running.pop(future), future.result()
                progress.advance(bar)
    finally:
        pool.shutdown(cancel_futures=True)


def num_frames(manifest: Manifest, entry: ShardEntry) -> int:
    return -(-entry.tokens // manifest.frame_tokens)


def spread_frames(
    manifest: Manifest, split: str, max_frames: int | None
) -> list[tuple[ShardEntry, list[int]]]:
    """At most `max_frames` frames, spread evenly over a split: shards with frame indices."""
    entries = manifest.split(split)
    total = sum(num_frames(manifest, entry) for entry in entries)
    chosen_frames = total if max_frames is None else min(total, max_frames)
    # The middle frame of each of `max_frames` equal parts.
    chosen = [(2 * part + 1) * total // (2 * chosen_frames) for part in range(chosen_frames)]
    spread: list[tuple[ShardEntry, list[int]]] = []
    first, position = 0, 0
    for entry in entries:
        stop = first + num_frames(manifest, entry)
        begin = position
        while position < len(chosen) and chosen[position] < stop:
            position += 1
        if position > begin:
            spread.append((entry, [frame - first for frame in chosen[begin:position]]))
        first = stop
    return spread
