"""Going through the shards of a data set: on threads with a bar, or by an even sample of frames.

Decompressing, compressing, hashing and reading release the interpreter's lock, so threads are
enough, and nothing has to be sent to another process.
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
    """Do some work for every item; give each with its result, in the order in which they finish.

    `workers` None is every core. The first exception ends it: what has not begun is not done. On a
    terminal a bar, called `label`, shows how many items are done.
    """
    console = SafeConsole(stderr=True)
    columns = (*SafeProgress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)))
    try:
        # Without a terminal, a bar would leave an empty line behind.
        with SafeProgress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            running = {pool.submit(work, item): item for item in items}
            bar = progress.add_task(label, total=len(running))
            for future in as_completed(running):
                # Taken out, so that results do not gather in memory.
                yield running.pop(future), future.result()
                progress.advance(bar)
    finally:
        pool.shutdown(cancel_futures=True)


def num_frames(manifest: Manifest, entry: ShardEntry) -> int:
    return -(-entry.tokens // manifest.frame_tokens)


def spread_frames(
    manifest: Manifest, split: str, max_frames: int | None
) -> list[tuple[ShardEntry, list[int]]]:
    """At most so many frames of a split, spread evenly over it: shards with numbers of frames."""
    entries = manifest.split(split)
    total = sum(num_frames(manifest, entry) for entry in entries)
    chosen_frames = total if max_frames is None else min(total, max_frames)
    # The middle one of each of as many equal parts; with all of them, each.
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
