"""Bounds on time and memory for hostile files, and the errors of commands that read data sets."""

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from click.testing import CliRunner

from data_pipeline.errors import ShardCorruptError
from data_pipeline.shards import inspection, recompress, verify
from data_pipeline.shards.manifest import MANIFEST_NAME
from tests.helpers.shard_parts import ShardParts

MAX_BYTES = 256 << 20
SHARD = "train-00002-00000.zst"


@contextmanager
def within_bounds(max_bytes: int = MAX_BYTES) -> Iterator[None]:
    """Check that the block takes less than a second and little memory.

    The limit on time is twice that, as tests share their cores and memory is traced.
    """
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        assert time.process_time() - started < 2
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()


def refused(folder: Path, code: int = ShardCorruptError.exit_code) -> str:
    """The errors of the commands that read a data set, each one line with this exit code."""
    said = ""
    out = folder.with_name("recompressed")
    for command, arguments in (
        (inspection.main, []),
        (verify.main, []),
        (recompress.main, ["--out", str(out)]),
    ):
        with within_bounds():
            result = CliRunner().invoke(command, [str(folder), *arguments, "--workers", "1"])
        assert result.exit_code == code, (result.output, result.exception)
        assert len(result.stderr) < 1000
        said += result.stderr
        assert not (out / SHARD).exists()
    return said


def change_shard(folder: Path, change: Callable[[ShardParts], object]) -> None:
    """Change a shard, and make the manifest agree with its size."""
    path = folder / SHARD
    parts = ShardParts.of(path.read_bytes())
    replaced = change(parts)
    path.write_bytes(replaced if isinstance(replaced, bytes) else parts.joined())
    agree(folder)


def agree(folder: Path, **changed: object) -> None:
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    (entry,) = (entry for entry in fields["shards"] if entry["file"] == SHARD)
    entry.update(file_bytes=max((folder / SHARD).stat().st_size, 1), **changed)
    (folder / MANIFEST_NAME).write_text(json.dumps(fields))
