"""Every rank and every host has a watcher, and silence alone does not end a healthy run."""

import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.faults.heartbeat import Heartbeat
from megaback.faults.peers import Peers, SilenceWatch, peers_of

LIMIT_S = 90
OWN = Heartbeat(
    rank=0,
    world_size=2,
    host=socket.gethostname(),
    pid=1,
    pid_started=0.0,
    phase="computing gradients",
    step=7,
    since=100.0,
    written=100.0,
    interval_s=10,
    timeout_s=300,
)
OTHER = replace(OWN, rank=1, host="n2", written=7.0)


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=24))
def test_every_rank_is_watched_on_its_host_and_every_host_by_another(hosts: list[str]) -> None:
    peers = [peers_of(rank, hosts) for rank in range(len(hosts))]
    neighbors = {one.neighbor for one in peers}
    distant = {one.distant for one in peers}
    firsts = {hosts.index(host) for host in hosts}
    for rank, host in enumerate(hosts):
        assert (rank in neighbors) is (hosts.count(host) > 1)
        assert (rank in distant) is (rank in firsts and len(set(hosts)) > 1)
        assert rank not in peers[rank].near
        assert sum(rank in one.near for one in peers) >= 1  # after a loss, someone looks at it
        if peers[rank].distant is not None:
            assert hosts[peers[rank].distant or 0] != host


def test_64_hosts_read_few_heartbeats() -> None:
    hosts = [f"n{rank // 8}" for rank in range(512)]
    peers = [peers_of(rank, hosts) for rank in range(512)]

    assert peers[0] == Peers(1, 8, tuple(range(1, 16)))
    assert peers[9] == Peers(10, None, (8, 10, 11, 12, 13, 14, 15))
    assert peers[511].neighbor == 504
    assert peers[504].distant == 0
    assert sum(one.distant is not None for one in peers) == 64
    assert sum(len(one.near) for one in peers) == 4096  # not 512 x 511


def lost_at(watch: SilenceWatch, *beats: tuple[Heartbeat | None, Heartbeat, bool]) -> int | None:
    """Number of the first beat, ten seconds apart, at which the rank counts as lost."""
    for number, (beat, own, has_written) in enumerate(beats):
        if watch.is_lost(beat, own, has_written, now=1000 + 10.0 * number):
            return number
    return None


@pytest.fixture
def watch() -> SilenceWatch:
    return SilenceWatch(LIMIT_S, 10)


def test_a_rank_that_is_silent_while_this_one_waits_is_lost_after_the_limit(
    watch: SilenceWatch,
) -> None:
    assert lost_at(watch, *[(OTHER, OWN, True)] * 20) == 10


def test_a_rank_whose_heartbeat_has_vanished_is_lost(watch: SilenceWatch) -> None:
    assert lost_at(watch, (OTHER, OWN, True), *[(None, OWN, True)] * 20) == 11


def test_a_heartbeat_that_arrives_late_or_by_another_clock_is_one_of_a_living_rank(
    watch: SilenceWatch,
) -> None:
    # A cache of NFS shows a new heartbeat only every 70 s; the other clock is an hour ahead.
    seen = [replace(OTHER, written=3600.0 + number // 7) for number in range(60)]
    assert lost_at(watch, *[(beat, OWN, True) for beat in seen]) is None


def test_a_rank_that_cannot_write_is_not_lost_while_steps_are_taken(watch: SilenceWatch) -> None:
    owns = [replace(OWN, since=100.0 + number // 8) for number in range(60)]
    assert lost_at(watch, *[(OTHER, own, True) for own in owns]) is None


def test_on_a_full_disk_no_rank_is_lost(watch: SilenceWatch) -> None:
    assert lost_at(watch, *[(OTHER, OWN, False)] * 60) is None


def test_a_rank_that_has_recorded_why_it_ends_is_not_lost(watch: SilenceWatch) -> None:
    left = replace(OTHER, exit_reason="trained to the end")
    assert lost_at(watch, *[(left, OWN, True)] * 60) is None


def test_a_pause_of_all_ranks_is_no_silence(watch: SilenceWatch) -> None:
    assert not watch.is_lost(OTHER, OWN, True, now=1000.0)
    assert not watch.is_lost(OTHER, OWN, True, now=1010.0)
    assert not watch.is_lost(OTHER, OWN, True, now=9000.0)  # a job that was suspended
    assert not watch.is_lost(OTHER, OWN, True, now=9010.0)
