"""Heartbeats tell a dead rank from a silent one, and both from one that waits."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megaback.heartbeat import (
    HEARTBEATS_FOLDER,
    Heartbeat,
    missing_ranks,
    read_heartbeats,
    write_heartbeat,
)

NOW = 1_000_000.0


def beat(rank: int = 0, world_size: int = 2, **changes: object) -> Heartbeat:
    """A rank of another host that is well."""
    well = Heartbeat(
        rank=rank,
        world_size=world_size,
        host="elsewhere",
        pid=1,
        pid_started=0.0,
        phase="updating",
        step=7,
        since=NOW - 1,
        written=NOW - 1,
        interval_s=10.0,
        timeout_s=300.0,
    )
    return replace(well, **changes)  # type: ignore[arg-type]


def of_process(pid: int) -> Heartbeat:
    """The heartbeat of a process of this machine."""
    started = psutil.Process(pid).create_time()
    return beat(host=os.uname().nodename, pid=pid, pid_started=started)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / HEARTBEATS_FOLDER).mkdir()
    return tmp_path


def test_heartbeats_read_back_by_rank(run: Path) -> None:
    for rank in (1, 0):
        write_heartbeat(run, beat(rank))

    assert read_heartbeats(run) == [beat(0), beat(1)]


def test_what_is_no_heartbeat_or_of_a_larger_world_is_left_out(run: Path) -> None:
    write_heartbeat(run, beat(0))
    write_heartbeat(run, beat(5))
    for number, content in enumerate(("", "[]", '{"rank": 1}')):
        (run / HEARTBEATS_FOLDER / f"rank-9{number}.json").write_text(content)

    assert read_heartbeats(run) == [beat(0)]


def test_a_living_process_is_not_gone() -> None:
    assert of_process(os.getpid()).is_gone is False


def test_a_process_that_ended_is_gone_before_and_after_it_is_waited_for() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    its = of_process(process.pid)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)

    assert its.is_gone is True
    process.communicate()
    assert its.is_gone is True


def test_a_number_that_another_process_has_now_is_gone() -> None:
    its = of_process(os.getpid())

    assert replace(its, pid_started=its.pid_started - 100).is_gone is True


def test_of_another_host_nothing_is_known() -> None:
    assert beat().is_gone is None


def test_ranks_that_are_well_are_not_missing() -> None:
    assert missing_ranks([beat(0), beat(1)], 2, NOW) == {}


def test_a_silent_rank_is_missing() -> None:
    missing = missing_ranks([beat(0), beat(1, written=NOW - 60)], 2, NOW)

    assert missing.keys() == {1}
    assert "has been silent for 60 s; it was at step 7, updating" in missing[1]


def test_a_dead_rank_is_missing_however_fresh_its_heartbeat() -> None:
    dead = replace(of_process(os.getpid()), rank=1, pid_started=0.0, written=NOW)

    assert "is dead" in missing_ranks([beat(0), dead], 2, NOW)[1]


def test_a_rank_that_was_never_heard_of_is_missing() -> None:
    assert missing_ranks([beat(0)], 2, NOW) == {1: "rank 1 has never been heard of"}


def test_ranks_that_left_are_named_only_when_nobody_else_is() -> None:
    left = beat(0, left="MemoryError: none", written=NOW - 500)

    assert "MemoryError: none" in missing_ranks([left, beat(1)], 2, NOW)[0]
    assert missing_ranks([left, beat(1, written=NOW - 60)], 2, NOW).keys() == {1}
