"""exit.json holds the first recorded reason of an end, the history every start and end."""

import json
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.faults.exit_record import read_exit, read_history, record_exit, record_start
from megaback.run_folder import EXIT_NAME, HISTORY_NAME

FAULT = {"code": 51, "kind": "RankLostError", "reason": "rank 3 is dead", "rank": 0}


def fault_in(fields: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of a record without host and time."""
    assert fields is not None
    return {name: fields[name] for name in FAULT}


def events_of(run: Path) -> list[str]:
    return [line["event"] for line in read_history(run)]


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / HISTORY_NAME).symlink_to(mine)
    (tmp_path / EXIT_NAME).symlink_to(mine)

    with pytest.raises(OSError, match="symbolic links"):
        record_start(tmp_path)

    record_exit(tmp_path, **FAULT)
    assert mine.read_text() == "mine"


def test_an_exit_record_reads_back(tmp_path: Path) -> None:
    assert record_exit(tmp_path, 51, "RankLostError", "rank 3 is dead", 0)

    assert fault_in(read_exit(tmp_path)) == FAULT


def test_an_exit_record_has_the_host_job_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    earliest = time.time()
    record_exit(tmp_path, 0, "finished", "trained to the end")
    fields = read_exit(tmp_path)

    assert fields is not None
    assert earliest <= fields["time"] <= time.time()
    assert (fields["host"], fields["job"]) == (socket.gethostname(), "77")
    assert fields["rank"] is None  # recorded by the launcher


def test_the_first_recorded_reason_is_kept(tmp_path: Path) -> None:
    record_exit(tmp_path, 51, "RankLostError", "rank 3 is dead", 0)

    assert not record_exit(tmp_path, 13, "LaunchError", "the ranks were killed")
    assert fault_in(read_exit(tmp_path)) == FAULT
    assert events_of(tmp_path) == ["exit"]


def _record(run: Path, rank: int) -> bool:
    return record_exit(run, 1, "Exception", f"rank {rank}", rank)


def test_exactly_one_of_many_processes_records_its_reason(tmp_path: Path) -> None:
    with get_context("spawn").Pool(4) as pool:  # forked, they would inherit locks of threads
        won = pool.starmap(_record, [(tmp_path, rank) for rank in range(8)], chunksize=1)

    fields = read_exit(tmp_path)
    assert fields is not None
    assert won == [rank == fields["rank"] for rank in range(8)]
    assert events_of(tmp_path) == ["exit"]


def test_a_start_removes_the_reason_of_the_previous_end(tmp_path: Path) -> None:
    record_exit(tmp_path, 51, "RankLostError", "rank 3 is dead", 0)
    record_start(tmp_path, step=0)
    assert read_exit(tmp_path) is None

    assert record_exit(tmp_path, 0, "finished", "trained to the end")


def test_the_history_has_every_start_and_end(tmp_path: Path) -> None:
    for step in (0, 100):
        record_start(tmp_path, step=step, world_size=2)
        record_exit(tmp_path, 75, "PreemptedError", f"at {step}")

    assert events_of(tmp_path) == ["start", "exit"] * 2
    assert [line.get("step") for line in read_history(tmp_path)] == [0, None, 100, None]
    assert [line.get("reason") for line in read_history(tmp_path)] == [None, "at 0", None, "at 100"]


@given(st.integers(1, 200))
def test_a_truncated_last_line_is_skipped(
    tmp_path_factory: pytest.TempPathFactory, cut_bytes: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    record_start(run, step=0)
    whole = (run / HISTORY_NAME).read_bytes()
    record_exit(run, 75, "PreemptedError", "r" * 200)
    data = (run / HISTORY_NAME).read_bytes()
    (run / HISTORY_NAME).write_bytes(data[:-cut_bytes])

    # A line that lacks only its newline is complete.
    assert events_of(run) == (["start", "exit"] if cut_bytes == 1 else ["start"])
    assert data.startswith(whole)


def test_lines_after_an_invalid_line_are_read(tmp_path: Path) -> None:
    record_start(tmp_path, step=0)
    with (tmp_path / HISTORY_NAME).open("a") as file:
        file.write('{"event": "exi\n')
    record_start(tmp_path, step=20)

    assert [line["step"] for line in read_history(tmp_path)] == [0, 20]


@pytest.mark.parametrize("content", ["", "{", '{"code": 5', "[]", "5", "null", "\0\0"])
def test_an_invalid_record_is_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / EXIT_NAME).write_text(content)

    assert read_exit(tmp_path) is None


def test_a_folder_without_a_run_has_neither_reason_nor_history(tmp_path: Path) -> None:
    for run in (tmp_path, tmp_path / "nowhere"):
        assert read_exit(run) is None
        assert read_history(run) == []


def test_a_folder_that_cannot_be_written_raises_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for run in (tmp_path / "nowhere", tmp_path / "file"):
        assert record_exit(run, 51, "RankLostError", "rank 3 is dead", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_raises_no_error(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    with full_disk():
        assert record_exit(tmp_path, 74, "StorageError", "r" * (1 << 17))

    assert read_exit(tmp_path) is None


def test_a_start_that_cannot_be_recorded_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        record_start(tmp_path / "nowhere", step=0)


def test_reasons_in_any_script_are_json_on_one_line(tmp_path: Path) -> None:
    reason = "zwei\nZeilen, \u2028 日本"
    record_exit(tmp_path, 1, "Exception", reason)

    (line,) = (tmp_path / HISTORY_NAME).read_text().splitlines()
    assert json.loads(line)["reason"] == read_history(tmp_path)[0]["reason"] == reason
