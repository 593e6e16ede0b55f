"""Progress of a build, summed over its workers: a bar on a terminal, JSON lines without one.

Every task counts in its own row of shared memory, without a lock that a killed worker could leave
behind.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from threading import Event, Thread
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from data_pipeline.common.durations import duration
from data_pipeline.common.rich_console import SafeConsole, SafeProgress

Counts = npt.NDArray[np.int64]
"""Documents, bytes of text, tokens, and bytes of input read: shape (4,)."""

_FIELDS = ("documents", "text_bytes", "tokens", "input_bytes")
_BAR_INTERVAL_S = 0.25
_LINE_INTERVAL_S = 10.0


def no_counts() -> Counts:
    return np.zeros(len(_FIELDS), dtype=np.int64)


class SharedCounts:
    """The counts of all tasks. `raw` may be passed to a new process."""

    def __init__(self, num_tasks: int) -> None:
        self.raw: Any = RawArray("q", max(num_tasks, 1) * len(_FIELDS))

    def total(self) -> dict[str, int]:
        sums = self._rows(self.raw).sum(axis=0).tolist()
        return dict(zip(_FIELDS, sums, strict=True))

    @classmethod
    def of_task(cls, raw: Any, index: int) -> Counts:
        """The row of one task, in the process that runs it."""
        row: Counts = cls._rows(raw)[index]
        return row

    @staticmethod
    def _rows(raw: Any) -> npt.NDArray[np.int64]:
        return np.frombuffer(raw, dtype=np.int64).reshape(-1, len(_FIELDS))


@contextmanager
def showing_progress(counts: SharedCounts, input_bytes: int) -> Iterator[None]:
    """Show the counts on stderr while the block runs; `input_bytes` is their expected total."""
    console = SafeConsole(stderr=True)
    started = time.monotonic()
    stop = Event()
    if console.is_terminal:
        thread = Thread(target=_show_bar, args=(counts, input_bytes, console, started, stop))
    else:
        thread = Thread(target=_write_lines, args=(counts, input_bytes, started, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _rates(counts: SharedCounts, input_bytes: int, started: float) -> dict[str, Any]:
    total = counts.total()
    elapsed_s = max(time.monotonic() - started, 1e-6)
    read_bytes = total["input_bytes"]
    left_s = elapsed_s * (input_bytes - read_bytes) / read_bytes if read_bytes else None
    return {
        **total,
        "of_input_bytes": input_bytes,
        "elapsed_s": round(elapsed_s, 1),
        "documents_per_s": round(total["documents"] / elapsed_s, 1),
        "text_mb_per_s": round(total["text_bytes"] / 1e6 / elapsed_s, 2),
        "tokens_per_s": round(total["tokens"] / elapsed_s),
        "left_s": None if left_s is None else round(max(left_s, 0.0)),
    }


def _write_lines(counts: SharedCounts, input_bytes: int, started: float, stop: Event) -> None:
    while not stop.wait(_LINE_INTERVAL_S):
        line = {"event": "build", **_rates(counts, input_bytes, started)}
        click.echo(json.dumps(line), err=True)


class _RateColumn(ProgressColumn):
    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True))  # fits into 80 columns

    def render(self, task: Task) -> Text:
        fields = task.fields
        left_s = fields["left_s"]
        left = "" if left_s is None else f"{duration(left_s)} left · "
        return Text(
            f"{left}{fields['documents_per_s']:,.0f} documents/s · "
            f"{fields['text_mb_per_s']:.1f} MB/s · {fields['tokens_per_s'] / 1e6:.2f} M tokens/s",
        )


def _show_bar(
    counts: SharedCounts, input_bytes: int, console: SafeConsole, started: float, stop: Event
) -> None:
    columns = (
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:>3.0f}%"),
        _RateColumn(),
        TimeElapsedColumn(),
    )
    with SafeProgress(*columns, console=console, transient=True) as progress:
        rates = _rates(counts, input_bytes, started)
        bar = progress.add_task("build", total=max(input_bytes, 1), **rates)
        while not stop.wait(_BAR_INTERVAL_S):
            rates = _rates(counts, input_bytes, started)
            progress.update(bar, completed=rates["input_bytes"], **rates)
