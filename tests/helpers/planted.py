"""A planted secret, and a search for it in processes and files."""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zstandard

PLANT = "S3CR3T-plant-9b1d"
_PERIOD_S = 0.02


@contextmanager
def watched_processes() -> Iterator[set[tuple[str, ...]]]:
    """Record the arguments of every new process whose command line contains the secret."""
    found: set[tuple[str, ...]] = set()
    stop = threading.Event()
    older = _process_ids()

    def watch() -> None:
        while not stop.wait(_PERIOD_S):
            running = _process_ids()
            older.intersection_update(running)  # an ended process's number is used again
            for name in running - older:
                try:
                    line = Path("/proc", name, "cmdline").read_bytes()
                except OSError:  # it has ended
                    continue
                if PLANT.encode() in line:
                    found.add(tuple(os.fsdecode(line).rstrip("\0").split("\0")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _process_ids() -> set[str]:
    return {entry.name for entry in os.scandir("/proc") if entry.name.isdigit()}


def files_with_plant(folders: Iterable[Path]) -> list[Path]:
    """The files below folders that contain the secret, also in compressed content."""
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and PLANT.encode() in _content(path)
    ]


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".zst":
        return data
    with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
        return data + stream.read()
