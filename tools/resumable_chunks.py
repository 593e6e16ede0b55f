"""Resumable output in chunks: a kill loses at most the current chunk.

A chunk is a list of JSON values. Chunks are dealt to tasks in turn: task t of N has chunks t,
t + N, ... A task appends each to its part, as one line with a checksum that another task's line
does not have. The part is renamed once it is complete.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import parse_json
from data_pipeline.common.regular_files import open_in_place
from data_pipeline.errors import StorageError

Chunk = list[Any]

_BLOCK_BYTES = 1 << 20
_MAX_LINE_BYTES = 256 << 20
"""A chunk is the records of a batch of texts."""


class ResumableChunks:
    """The parts of all tasks, in one folder."""

    def __init__(self, folder: Path, num_tasks: int) -> None:
        self._folder = folder
        self._num_tasks = num_tasks

    def is_done(self, task: int) -> bool:
        return self._path(task).is_file() and not self._path(task).is_symlink()

    @property
    def missing(self) -> list[int]:
        """Tasks that are not done."""
        return [task for task in range(self._num_tasks) if not self.is_done(task)]

    def resume(self, task: int) -> int:
        """Number of chunks of an unfinished part; truncates the partial line that a kill left."""
        path = self._unfinished(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        num_chunks, end = 0, 0
        with open_in_place(path, "ab+") as file:
            file.seek(0)
            while block := file.read(_BLOCK_BYTES):
                num_chunks += block.count(b"\n")
                if (last := block.rfind(b"\n")) >= 0:
                    end = file.tell() - len(block) + last + 1
            file.truncate(end)
        return num_chunks

    def append(self, task: int, chunk: Chunk) -> None:
        """Append a chunk durably (fsync). Raises OSError."""
        with open_in_place(self._unfinished(task), "ab") as file:
            file.write(_line(json.dumps(chunk).encode(), task))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, task: int) -> None:
        """Mark a task as done: give its part the final name."""
        os.replace(self._unfinished(task), self._path(task))

    def read_all(self) -> Iterator[Chunk]:
        """Every chunk, in order, once no task is missing. Raises StorageError."""
        files = [open_in_place(self._path(task), "rb") for task in range(self._num_tasks)]
        try:
            number = 0
            while line := files[number % self._num_tasks].readline(_MAX_LINE_BYTES):
                yield self._parsed(line, number)
                number += 1
            if any(file.read(1) for file in files):
                raise StorageError(
                    f"{self._folder} lacks chunk {number}, but has later ones; remove the folder "
                    "and run the command again"
                )
        finally:
            for file in files:
                file.close()

    def _parsed(self, line: bytes, number: int) -> Chunk:
        task = number % self._num_tasks
        content = line.partition(b" ")[2].removesuffix(b"\n")
        try:
            if line != _line(content, task):
                raise ValueError("its checksum differs")
            chunk = parse_json(content)
            if not isinstance(chunk, list):
                raise ValueError("it is not a list")
        except ValueError as error:
            place = f"{self._path(task)}:{number // self._num_tasks + 1}"
            raise StorageError(
                f"{place} is corrupted ({error}); remove the file and run the command again"
            ) from None
        return chunk

    def lock_path(self, task: int) -> Path:
        """Lock file of a task; its holder does the task."""
        return self._folder / f"part-{task:05d}.lock"

    def _path(self, task: int) -> Path:
        return self._folder / f"part-{task:05d}.jsonl"

    def _unfinished(self, task: int) -> Path:
        return self._folder / f"part-{task:05d}.unfinished"


def _line(content: bytes, task: int) -> bytes:
    """The line of a chunk: its checksum, which depends on the task, and its JSON."""
    return b"%08x %s\n" % (zlib.crc32(content, task), content)
