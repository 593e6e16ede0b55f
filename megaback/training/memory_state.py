"""State of a GPU's allocator, written into the run's folder as a rank runs out of memory.

`memory/rank-00000.txt` is a summary to read, `rank-00000.pickle` PyTorch's snapshot for its viewer,
with a history of allocations if `training.memory_history` is set. The snapshot is a pickle, which
megaback writes and never reads. Errors are ignored: that of the rank matters more.
"""

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.atomic import replacing, write_text
from megaback.run_folder import memory_path

_MAX_ENTRIES = 100_000
"""Allocations and frees that are kept, some hundred per layer and step."""
_MAX_SNAPSHOT_BYTES = 256 << 20


def record_memory_history(device: torch.device) -> None:
    """Record the last allocations with their Python stacks, about 2 µs each; on a CPU, nothing."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES, stacks="python")


def write_memory_state(
    run: Path,
    rank: int,
    device: torch.device,
    publish: Callable[[Path, Path], None] = os.replace,
) -> list[Path]:
    """Write the summary and the snapshot; returns the files that could be written."""
    written: list[Path] = []
    if device.type != "cuda":
        return written
    for suffix, write in ((".txt", _write_summary), (".pickle", _write_snapshot)):
        path = memory_path(run, rank, suffix)
        with suppress(Exception):
            path.parent.mkdir(exist_ok=True)
            write(path, device, publish)
            written.append(path)
    return written


def _write_summary(path: Path, device: torch.device, publish: Callable[..., None]) -> None:
    write_text(path, torch.cuda.memory_summary(device) + "\n", publish)


def _write_snapshot(path: Path, device: torch.device, publish: Callable[..., None]) -> None:
    snapshot = torch.cuda.memory._snapshot(device)
    with replacing(path, publish) as file:
        pickle.dump(snapshot, _Bounded(file, _MAX_SNAPSHOT_BYTES))


class _Bounded:
    """A file that takes a number of bytes at most."""

    def __init__(self, file: Any, max_bytes: int) -> None:
        self._file, self._left = file, max_bytes

    def write(self, data: Any) -> int:
        """Raises ValueError for bytes above the limit."""
        num_bytes = memoryview(data).nbytes
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError("the snapshot is too large")
        self._file.write(data)
        return num_bytes
