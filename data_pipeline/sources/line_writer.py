"""JSON Lines as the output of a command: a file, or stdout for `-`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_pipeline.common.output_paths import writing_output
from data_pipeline.sources.jsonl import STANDARD_STREAM, line_of


class LineWriter:
    """Writes one object per line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, fields: dict[str, Any]) -> None:
        self._file.write(line_of(fields))


@contextmanager
def writing_lines(path: str, *, overwrite: bool) -> Iterator[LineWriter]:
    """Write an output as `writing_output` does, or to stdout for `-`."""
    if path == STANDARD_STREAM:
        yield LineWriter(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    with writing_output(Path(path), overwrite=overwrite) as file:
        yield LineWriter(file)
