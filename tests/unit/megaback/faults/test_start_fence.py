"""A rank of an older start notices a newer one; caches, other runs and damaged files are none."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import StorageError, SupersededError
from megaback.faults.start_fence import NO_FENCE, Fence, Start, begin_start, read_start
from megaback.run_folder import START_NAME


def fence_of(run: Path, start: Start) -> Fence:
    return Fence(start, run, lambda: run)


def test_the_newest_start_reads_back_and_is_numbered(tmp_path: Path) -> None:
    older = begin_start(tmp_path)
    newer = begin_start(tmp_path, "0123456789ab")

    assert read_start(tmp_path) == newer
    assert (newer.id, newer.number) == ("0123456789ab", older.number + 1)


def test_an_older_start_is_superseded_and_the_newest_is_not(tmp_path: Path) -> None:
    older = begin_start(tmp_path)
    assert fence_of(tmp_path, older).problem() is None

    newer = begin_start(tmp_path)

    assert fence_of(tmp_path, newer).problem() is None
    assert NO_FENCE.problem() is None
    assert f"has begun on {newer.host} at 2" in str(fence_of(tmp_path, older).problem())


def test_an_older_start_in_a_cache_supersedes_nothing(tmp_path: Path) -> None:
    older = begin_start(tmp_path)
    cached = (tmp_path / START_NAME).read_bytes()
    newer = begin_start(tmp_path)
    (tmp_path / START_NAME).write_bytes(cached)

    assert read_start(tmp_path) == older
    assert fence_of(tmp_path, newer).problem() is None


def test_of_two_starts_at_the_same_moment_one_is_superseded(tmp_path: Path) -> None:
    first = begin_start(tmp_path)
    second = replace(first, id="0123456789ab")
    (tmp_path / START_NAME).write_text(json.dumps(asdict(second)))

    assert fence_of(tmp_path, first).problem() is not None
    assert fence_of(tmp_path, second).problem() is None


def test_a_moved_folder_is_found_and_another_run_in_its_place_is_no_newer_start(
    tmp_path: Path,
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    older = begin_start(run)
    shutil.move(run, moved)
    run.mkdir()
    for _ in range(3):
        begin_start(run)

    def gone() -> Path:
        raise StorageError("the folder is gone")

    assert Fence(older, run, lambda: moved).problem() is None
    assert Fence(older, run, gone).problem() is None
    begin_start(moved)
    assert Fence(older, run, lambda: moved).problem() is not None


@pytest.mark.parametrize(
    "change",
    [{"id": "../../x"}, {"number": 1.5}, {"time": -1}, {"host": None}, {"more": 1}, None],
)
def test_a_damaged_or_missing_file_names_no_start(tmp_path: Path, change: Any) -> None:
    start = begin_start(tmp_path)
    path = tmp_path / START_NAME
    path.write_text("{" if change is None else json.dumps({**asdict(start), **change}))

    assert read_start(tmp_path) is None
    assert fence_of(tmp_path, start).problem() is None
    path.unlink()
    assert fence_of(tmp_path, start).problem() is None


_RENAME = """
import sys
from pathlib import Path
from megaback.faults.start_fence import Fence, begin_start
run = Path(sys.argv[1])
fence = Fence(begin_start(run), run, lambda: run)
for number in range(2):
    (run / "partial").write_text(str(number))
    fence.replace(run / "partial", run / "final")
    begin_start(run)
"""


def test_a_file_of_an_older_start_is_removed_instead_of_renamed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RENAME, tmp_path], capture_output=True, text=True, check=False
    )

    assert done.returncode == SupersededError.exit_code, done.stderr
    assert (tmp_path / "final").read_text() == "0"
    assert not (tmp_path / "partial").exists()
