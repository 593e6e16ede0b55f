"""Memory limit for readers of formats in which a few bytes claim gigabytes."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from resource import RLIMIT_DATA, getrlimit
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build.plan import cut_evenly
from data_pipeline.errors import BadRecordError, MegabackError, SourceUnreadableError
from data_pipeline.sources import memory_fence
from data_pipeline.sources.documents import Columns
from data_pipeline.sources.memory_fence import MemoryFence
from data_pipeline.sources.registry import list_slices, list_source, read_slice

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts all memory")

MEASURE = """
import sys, time
from data_pipeline.errors import MegabackError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.registry import Columns, list_slices, read_slice

start = time.monotonic()
columns = ExampleColumns() if sys.argv[2] == "examples" else Columns()
try:
    for piece in list_slices(sys.argv[1], columns):
        for document in read_slice(piece, columns):
            pass
    print("read")
except MegabackError as error:
    print(f"{type(error).__name__}: {error}")
# Not ru_maxrss, which begins with that of the process that started this one.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(time.monotonic() - start, int(status["VmHWM"].split()[0]) >> 10)
"""


def repeated(text: str, number: int) -> pa.Array:
    """A column of one repeated text, which a file stores once."""
    return pa.DictionaryArray.from_arrays(np.zeros(number, np.int32), pa.array([text]))


def write_bomb(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        store_schema=False,
        dictionary_pagesize_limit=1 << 30,
    )
    assert path.stat().st_size < 2000
    return path


@linux_only
@pytest.mark.parametrize("kind", ["rows", "messages", "streamed"])
def test_reading_a_parquet_bomb_takes_bounded_memory(tmp_path: Path, kind: str) -> None:
    source = str(tmp_path / "a.parquet")
    if kind == "messages":
        values = pa.ListArray.from_arrays([0, 30_000_000], repeated("x" * 100, 30_000_000))
        write_bomb(tmp_path / "a.parquet", {"messages": values})
    else:
        write_bomb(tmp_path / "a.parquet", {"text": repeated("x" * (8 << 20), 1000)})
    if kind == "streamed":
        config = {"config_name": "all", "data_files": "a.parquet", "columns": ["text"]}
        (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
        source = f"hf:{tmp_path}"
    kind = "examples" if kind == "messages" else ""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, source, kind], capture_output=True, text=True, check=True
    )
    output, measured = result.stdout.splitlines()
    assert "reading it takes more than 768 MiB of memory" in output
    assert "Traceback" not in result.stderr
    assert float(measured.split()[1]) < 1024


@linux_only
def test_the_fence_is_up_until_the_last_reader_has_finished() -> None:
    before = getrlimit(RLIMIT_DATA)
    fence = MemoryFence("a file", 1)
    with pytest.raises(SourceUnreadableError, match="a file: reading it takes more than 768 MiB"):
        list(fence.each(bytearray(size) for size in (1 << 20, 1 << 30)))
    assert getrlimit(RLIMIT_DATA) == before
    assert len(bytearray(1 << 30)) == 1 << 30
    inner, outer = threading.Event(), threading.Event()

    def other() -> None:
        with fence.up():
            inner.set()
            outer.wait()

    thread = threading.Thread(target=other)
    with fence.up():
        thread.start()
        inner.wait()
    assert getrlimit(RLIMIT_DATA) != before  # for the other thread
    outer.set()
    thread.join()
    assert getrlimit(RLIMIT_DATA) == before


def test_other_systems_have_no_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_fence.sys, "platform", "darwin")
    with MemoryFence("a file", 1).up():
        assert len(bytearray(800 << 20)) == 800 << 20


def test_rows_of_a_file_without_the_columns_are_counted_without_reading(tmp_path: Path) -> None:
    table = pa.table({"body": repeated("x", 50_000_000)})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    (tmp_path / "b.jsonl").write_text('{"text": "fits"}\n')
    bad: list[BadRecordError] = []
    first, _ = list_source(str(tmp_path), skips_bad=True).slices
    assert list(read_slice(first, Columns(), bad.append)) == []
    assert sum(error.number for error in bad) == 50_000_000
    assert len(bad) == 11


def test_huge_claimed_sizes_do_not_make_long_lists_of_tasks() -> None:
    assert cut_evenly([1 << 62, 1, 1 << 62]) == (1, 1, 1)
    assert cut_evenly([1 << 62, 1], 3) == (0, 1, 1)


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 255)), min_size=1, max_size=3))
def test_an_altered_parquet_file_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        pq.write_table(pa.table({"text": ["one", "two", None, "three"]}), path, row_group_size=2)
        altered = bytearray(path.read_bytes())
        for at, change in changes:
            altered[at % len(altered)] ^= change
        path.write_bytes(altered)
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(_read_or_refuse(path))
        _, status = os.waitpid(child, 0)
    # pyarrow's metadata bindings abort the process for inconsistent sizes of levels.
    assert status in (0, signal.SIGABRT)


def _read_or_refuse(path: Path) -> int:
    try:
        for piece in list_slices(str(path)):
            list(read_slice(piece, Columns(), lambda _: None))
    except MegabackError:
        return 0
    except BaseException:  # noqa: BLE001 - any other error is a failure
        return 1
    return 0
