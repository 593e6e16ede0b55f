"""Faults of disks and sources during builds: one error message, no partial file, then a resume.

Every case ends with the bytes of an undisturbed build.
"""

import gzip
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.build.plan import BUILD_FOLDER, Plan
from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task import run_task
from data_pipeline.common import process_pool
from data_pipeline.errors import (
    BadRecordError,
    MegabackError,
    SourceUnreadableError,
    StorageError,
)
from data_pipeline.shards.reader import ShardReader
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec

NOBODY = 65534
DISK_BYTES = 1 << 20

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Build = Run
with_and_without_selection = pytest.mark.parametrize(
    "selection", [(), ("--deduplicate",)], ids=["all", "selection"]
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    )
    if mounting.returncode:
        pytest.skip("mounting a file system needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def resize(disk: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(disk)], check=True)


@pytest.fixture
def build(run_megaback: Run, source: Path, tokenizer_path: Path) -> Build:
    """`build(out, *options)`: the command, on twelve tasks."""

    def run(out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
        return run_megaback(
            *("shards", "build", "--source", source, "--tokenizer", tokenizer_path, "--out", out),
            *("--tasks", 12, "--workers", 2, "--frame-tokens", 256, "--shard-tokens", 4000),
            *("--val-fraction", 0.1, *options),
        )

    return run


@pytest.fixture
def source(tmp_path: Path, english_documents: list[str]) -> Path:
    """Four files: plain and compressed lines, and parquet."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "source"
    folder.mkdir()
    records = [
        [{"text": f"{text} {copy}"} for copy in range(8) for text in english_documents[number::4]]
        for number in range(4)
    ]
    lines = ["".join(json.dumps(record) + "\n" for record in part) for part in records]
    (folder / "0.jsonl").write_text(lines[0])
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(lines[1].encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[2]), folder / "2.parquet")
    (folder / "3.jsonl").write_text(lines[3])
    return folder


def contents(out: Path) -> dict[str, str]:
    """Hashes of all files except records and locks, partial and staged files included."""
    hidden = out / BUILD_FOLDER
    kept = {*hidden.glob("*.lock"), *hidden.glob("task-?????.json")}
    kept |= {*hidden.glob("selected-?????.json")}
    return {
        str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
        for path in sorted({*out.rglob("*")} - kept)
        if path.is_file()
    }


def require_one_sentence(
    result: "subprocess.CompletedProcess[str]", kind: type[MegabackError], *names: str
) -> None:
    assert result.returncode == kind.exit_code, result.stderr
    # A build that takes longer than ten seconds prints its progress.
    lines = result.stderr.splitlines()
    (sentence,) = [line for line in lines if not line.startswith('{"event": "build"')]
    assert sentence.startswith("megaback: error: ")
    assert [name for name in names if name not in sentence] == []


def require_nothing_half_written(out: Path) -> None:
    """Check that every shard under its final name is complete and no unfinished file is left."""
    assert not (out / "manifest.json").exists()
    assert list(out.rglob("*.partial")) == []
    for shard in out.rglob("*.zst"):
        with ShardReader(shard) as reader:
            for frame in range(reader.num_frames):
                reader.frame(frame)


@with_and_without_selection
@pytest.mark.parametrize("used", [0.3, 0.6, 0.9])
def test_a_build_resumes_after_a_disk_filled_up_midway(
    used: float,
    selection: tuple[str, ...],
    build: Build,
    disk: Path,
    tmp_path: Path,
) -> None:
    assert build(tmp_path / "uninterrupted", *selection).returncode == 0
    needed_bytes = bytes_of(tmp_path / "uninterrupted")
    resize(disk, int(needed_bytes * used))
    full = build(disk / "shards", *selection)
    require_one_sentence(full, StorageError, str(disk), "free some space")
    require_nothing_half_written(disk / "shards")

    resize(disk, 4 * needed_bytes)
    result = build(disk / "shards", *selection)
    assert result.returncode == 0, result.stderr
    assert contents(disk / "shards") == contents(tmp_path / "uninterrupted")


def bytes_of(folder: Path) -> int:
    """In whole pages, as a file system counts."""
    return sum(
        -(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()
    )


@with_and_without_selection
def test_a_build_resumes_after_a_disk_filled_up_at_the_end(
    selection: tuple[str, ...],
    build: Build,
    run_megaback: Run,
    source: Path,
    tokenizer_path: Path,
    disk: Path,
    tmp_path: Path,
) -> None:
    assert build(tmp_path / "uninterrupted", *selection).returncode == 0
    resize(disk, 16 << 20)
    out = disk / "shards"
    build(out, *selection, "--task-index", "0")
    for task in Plan.load(out).tasks[1:]:
        run_task(task, out, tokenizer_path.read_bytes())
    records = {path: path.stat().st_mtime_ns for path in out.glob(".build/task-*.json")}
    space = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize))

    require_one_sentence(run_megaback("shards", "finalize", out), StorageError, str(disk))
    require_nothing_half_written(out)
    filler.unlink()
    assert run_megaback("shards", "finalize", out).returncode == 0
    assert contents(out) == contents(tmp_path / "uninterrupted")
    assert {path: path.stat().st_mtime_ns for path in records} == records


def _cut_by_a_third(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 3])


def _one_bad_line(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:6], lines[6][:-4] + "\n", *lines[7:]]))


FAULTS: dict[str, tuple[str, Callable[[Path], None], type[MegabackError], str]] = {
    "a truncated gz file": (
        "1.jsonl.gz",
        _cut_by_a_third,
        SourceUnreadableError,
        "1.jsonl.gz: truncated",
    ),
    "a truncated parquet file": (
        "2.parquet",
        _cut_by_a_third,
        SourceUnreadableError,
        "2.parquet: truncated",
    ),
    "a bad record": ("3.jsonl", _one_bad_line, BadRecordError, "3.jsonl:7:"),
}


@pytest.mark.parametrize("is_planned", [False, True], ids=["at first", "after the plan"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_build_resumes_after_a_broken_file_is_fixed(
    fault: str, is_planned: bool, build: Build, source: Path, run_megaback: Run, tmp_path: Path
) -> None:
    name, break_file, kind, sentence = FAULTS[fault]
    out = tmp_path / "shards"
    assert build(tmp_path / "uninterrupted").returncode == 0
    before = (source / name).read_bytes()
    if is_planned:
        build(out, "--task-index", "0")
        kind, sentence = SourceUnreadableError, f"{name}: changed since"
    break_file(source / name)
    broken = run_megaback("shards", "build", "--out", out) if is_planned else build(out)
    require_one_sentence(broken, kind, sentence)
    if out.exists():
        require_nothing_half_written(out)

    (source / name).write_bytes(before)
    result = build(out)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(tmp_path / "uninterrupted")


def test_skipped_bad_records_are_counted(build: Build, source: Path, tmp_path: Path) -> None:
    _one_bad_line(source / "3.jsonl")
    result = build(tmp_path / "shards", "--on-bad-record", "skip")
    assert "documents excluded: 1 (bad record)" in result.stdout


@pytest.fixture
def shared_place(source: Path) -> Iterator[Path]:
    """World-writable folder with the source in it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(source, place / "source")
        for path in (place, *place.rglob("*")):
            path.chmod(0o777)
        yield place


def test_a_build_resumes_after_an_unreadable_file_becomes_readable(
    shared_place: Path, codec: Callable[..., TextCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        process_pool, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
    )
    forbidden = shared_place / "source" / "1.jsonl.gz"
    out = shared_place / "shards"
    settings = BuildSettings(
        (WeightedSource(str(shared_place / "source")),), codec().format.tokenizer_sha256
    )
    codec().encode_document("everything that is loaded when first used")
    forbidden.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)  # root may read everything
    try:
        with pytest.raises(SourceUnreadableError, match=r"1\.jsonl\.gz: Permission denied"):
            build_shards(settings, codec(), out, workers=1)
        assert not out.exists()
    finally:
        if is_root:
            os.seteuid(0)
    forbidden.chmod(0o666)
    build_shards(settings, codec(), out, workers=1)
    assert (out / "manifest.json").exists()


def test_a_read_only_folder_is_one_error_message(build: Build, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    require_one_sentence(build(disk / "shards"), StorageError, str(disk), "a writable disk")


def test_a_finished_data_set_on_a_read_only_disk_counts_as_finished(
    build: Build, disk: Path
) -> None:
    resize(disk, 16 << 20)
    assert build(disk / "shards").returncode == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    result = build(disk / "shards")
    assert result.returncode == 0, result.stderr
    assert "12 tasks were already done" in result.stdout
