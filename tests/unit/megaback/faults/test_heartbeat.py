"""Heartbeats hold a rank's phase, and missing ranks are described."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.faults.heartbeat import Heartbeat, missing_ranks, read_heartbeats, write_heartbeat
from megaback.run_folder import HEARTBEATS_FOLDER, heartbeat_path

NOW = 1_000_000.0
HERE = Heartbeat(
    rank=0,
    world_size=3,
    host=socket.gethostname(),
    pid=os.getpid(),
    pid_started=psutil.Process().create_time(),
    phase="updating",
    step=7,
    since=NOW - 4,
    written=NOW - 3,
    interval_s=10.0,
    timeout_s=300.0,
)
"""Heartbeat of this process, which is healthy."""


def test_a_heartbeat_is_not_written_through_a_link(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / HEARTBEATS_FOLDER).mkdir()
    heartbeat_path(tmp_path, 0).with_suffix(".partial").symlink_to(mine)
    heartbeat_path(tmp_path, 1).symlink_to(mine)

    with pytest.raises(OSError, match="symbolic links"):
        write_heartbeat(tmp_path, HERE)
    write_heartbeat(tmp_path, replace(HERE, rank=1))

    assert mine.read_text() == "mine"
    assert [beat.rank for beat in read_heartbeats(tmp_path)] == [1]


def alive(rank: int, **fields: Any) -> Heartbeat:
    return replace(HERE, rank=rank, **fields)


def dead(rank: int, **fields: Any) -> Heartbeat:
    """Heartbeat of an ended process whose id this one has."""
    return alive(rank, pid_started=HERE.pid_started - 100, **fields)


def silent(rank: int, **fields: Any) -> Heartbeat:
    """Heartbeat of another host that is too old."""
    return alive(rank, host="elsewhere", written=NOW - 26, **fields)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / HEARTBEATS_FOLDER).mkdir()
    return tmp_path


@pytest.fixture
def child() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits for the end of its input."""
    script = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def beat_of(child: "subprocess.Popen[bytes]") -> Heartbeat:
    return alive(1, pid=child.pid, pid_started=psutil.Process(child.pid).create_time())


def wait_for_zombie(pid: int) -> None:
    give_up = time.monotonic() + 30
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up
        time.sleep(0.01)


@given(
    st.builds(
        Heartbeat,
        rank=st.integers(0, 99_999),
        world_size=st.just(100_000),
        exit_reason=st.none() | st.text(),
        **{name: st.text() for name in ("host", "phase")},
        **{name: st.integers(0, 1 << 22) for name in ("pid", "step")},
        **{
            name: st.floats(0, 1e11)
            for name in ("pid_started", "since", "written", "interval_s", "timeout_s")
        },
    )
)
def test_a_heartbeat_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, beat: Heartbeat
) -> None:
    run = tmp_path_factory.mktemp("run")
    (run / HEARTBEATS_FOLDER).mkdir()
    write_heartbeat(run, beat)

    assert read_heartbeats(run) == [beat]


def test_only_the_newest_heartbeat_of_a_rank_is_kept(run: Path) -> None:
    for step in (1, 2, 3):
        write_heartbeat(run, alive(0, step=step))

    assert [beat.step for beat in read_heartbeats(run)] == [3]
    assert list((run / HEARTBEATS_FOLDER).iterdir()) == [heartbeat_path(run, 0)]


def test_heartbeats_are_in_order_of_rank(run: Path) -> None:
    for rank in (10, 2, 0, 100):
        write_heartbeat(run, alive(rank, world_size=101))

    assert [beat.rank for beat in read_heartbeats(run)] == [0, 2, 10, 100]


def test_a_lost_node_of_many_is_found_by_its_ranks(run: Path) -> None:
    for rank in range(512):
        written = NOW - 60 if rank // 8 == 17 else NOW - 3
        beat = alive(rank, world_size=512, host=f"n{rank // 8}", written=written)
        write_heartbeat(run, beat)

    missing = missing_ranks(read_heartbeats(run), range(512), NOW)

    assert list(missing) == list(range(136, 144))
    assert all("(n17, process" in reason for reason in missing.values())


def test_ranks_outside_of_their_world_are_skipped(run: Path) -> None:
    for rank in range(4):
        write_heartbeat(run, alive(rank, world_size=2))

    assert [beat.rank for beat in read_heartbeats(run)] == [0, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\0",
        json.dumps({**asdict(HERE), "another": 1}).encode(),
        json.dumps({**asdict(HERE), "rank": 1}).encode()[:-2],
    ],
)
def test_an_invalid_heartbeat_is_skipped(content: bytes, run: Path) -> None:
    write_heartbeat(run, alive(0))
    heartbeat_path(run, 1).write_bytes(content)
    heartbeat_path(run, 2).mkdir()

    assert read_heartbeats(run) == [alive(0)]


def test_a_run_that_never_began_has_no_heartbeats(tmp_path: Path) -> None:
    assert read_heartbeats(tmp_path) == []


def test_a_heartbeat_that_cannot_be_written_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_heartbeat(tmp_path, HERE)


def test_a_process_that_runs_is_not_gone(child: "subprocess.Popen[bytes]") -> None:
    assert HERE.is_gone is False
    assert beat_of(child).is_gone is False


def test_a_process_that_ended_is_gone(child: "subprocess.Popen[bytes]") -> None:
    beat = beat_of(child)
    child.kill()
    wait_for_zombie(child.pid)
    assert beat.is_gone is True  # its exit code was not collected yet
    child.wait()

    assert beat.is_gone is True


def test_a_process_with_a_reused_id_is_gone() -> None:
    assert dead(0).is_gone is True


def test_the_state_of_another_hosts_process_is_unknown() -> None:
    assert alive(0, host="elsewhere").is_gone is None
    assert dead(0, host="elsewhere").is_gone is None


def test_no_rank_is_missing_when_all_are_healthy() -> None:
    assert missing_ranks([alive(0), alive(1), alive(2)], range(3), NOW) == {}


def test_a_dead_rank_is_named_with_its_step_and_phase() -> None:
    assert missing_ranks([alive(0), dead(1), alive(2)], range(3), NOW) == {
        1: f"rank 1 ({HERE.host}, process {HERE.pid}) is dead; "
        "its last heartbeat was at step 7, updating"
    }


def test_a_silent_rank_is_named_with_the_age_of_its_heartbeat() -> None:
    assert missing_ranks([alive(0), alive(1), silent(2)], range(3), NOW) == {
        2: f"rank 2 (elsewhere, process {HERE.pid}) has written no heartbeat for 26 s; "
        "it was at step 7, updating"
    }


@pytest.mark.parametrize(("age_s", "is_missing"), [(0, False), (25, False), (25.1, True)])
def test_a_rank_is_silent_after_two_and_a_half_intervals(age_s: float, is_missing: bool) -> None:
    beat = alive(0, written=NOW - age_s)

    assert (missing_ranks([beat], range(1), NOW) != {}) is is_missing


def test_the_default_time_is_now() -> None:
    assert missing_ranks([alive(0, written=time.time())], range(1)) == {}
    assert missing_ranks([alive(0, written=time.time() - 30)], range(1)).keys() == {0}


def test_a_rank_without_a_heartbeat_is_named() -> None:
    assert missing_ranks([alive(1)], range(3), NOW) == {
        0: "rank 0 has written no heartbeat",
        2: "rank 2 has written no heartbeat",
    }


def test_a_rank_that_ended_with_a_reason_is_named_if_it_is_the_only_one() -> None:
    left = dead(1, exit_reason="a full disk")

    assert missing_ranks([alive(0), left, alive(2)], range(3), NOW) == {
        1: f"{left.name} ended: a full disk"
    }


def test_a_rank_that_ended_with_a_reason_is_not_named_beside_others() -> None:
    left = dead(1, exit_reason="another rank was lost", written=NOW - 999)

    for other in (dead(2), silent(2)):
        assert missing_ranks([alive(0), left, other], range(3), NOW).keys() == {2}
    assert missing_ranks([alive(0), left], range(3), NOW).keys() == {2}


kinds = st.sampled_from(["healthy", "dead", "silent", "ended", "never"])


@given(st.lists(kinds, min_size=1, max_size=6))
def test_ranks_without_a_reason_are_missing_else_those_with_one(kinds: list[str]) -> None:
    make = {"healthy": alive, "dead": dead, "silent": silent}
    beats = [
        dead(rank, exit_reason="why") if kind == "ended" else make[kind](rank)
        for rank, kind in enumerate(kinds)
        if kind != "never"
    ]
    unexplained = {rank for rank, kind in enumerate(kinds) if kind in ("dead", "silent", "never")}
    ended = {rank for rank, kind in enumerate(kinds) if kind == "ended"}

    assert missing_ranks(beats, range(len(kinds)), NOW).keys() == (unexplained or ended)
