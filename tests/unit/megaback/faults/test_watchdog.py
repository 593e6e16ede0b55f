"""The watchdog writes the phase of its rank, and names lost ranks."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

from data_pipeline.common.locks import replace_lock, take_lock
from data_pipeline.errors import RankLostError, SupersededError
from megaback.config_operation import HardwareSection
from megaback.distributed.world import CollectiveExit, World
from megaback.faults.exit_record import read_exit, record_exit, record_start
from megaback.faults.heartbeat import Heartbeat, read_heartbeats, write_heartbeat
from megaback.faults.peers import Peers
from megaback.faults.watchdog import Watchdog

SECTION = HardwareSection(heartbeat_s=0.1, step_timeout_s=50, collective_timeout_s=60)


@pytest.fixture
def watchdog(tmp_path: Path, world: World) -> Iterator[Watchdog]:
    """The watchdog of a run with one rank."""
    watchdog = Watchdog(tmp_path, SECTION, world)
    watchdog.open()
    yield watchdog
    watchdog.mark_exited("the test is over")


def heartbeat_with(run: Path, **values: object) -> Heartbeat:
    """The first rank's heartbeat, once it has these values."""
    give_up = monotonic() + 20
    while monotonic() < give_up:
        (beat,) = read_heartbeats(run)
        if vars(beat).items() >= values.items():
            return beat
        sleep(0.01)
    raise AssertionError(f"{beat} has not {values}")


def test_nothing_is_written_before_open(tmp_path: Path, world: World) -> None:
    watchdog = Watchdog(tmp_path, SECTION, world)
    watchdog.set_phase("loading", 1)
    watchdog.mark_exited("refused")

    assert not watchdog.is_open
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_has_the_phase_and_step(watchdog: Watchdog, tmp_path: Path) -> None:
    watchdog.set_phase("saving", 7)

    assert heartbeat_with(tmp_path, phase="saving", step=7).timeout_s == 60


def test_steps_have_a_timeout_of_their_own(watchdog: Watchdog, tmp_path: Path) -> None:
    watchdog.use_step_timeout()

    heartbeat_with(tmp_path, timeout_s=50)


def test_heartbeats_of_a_larger_world_are_removed(tmp_path: Path, world: World) -> None:
    watchdog = Watchdog(tmp_path, SECTION, world)
    (tmp_path / "heartbeats").mkdir()
    for rank in (1, 3, 511):  # the others' have been lost
        write_heartbeat(tmp_path, replace(watchdog._beat, rank=rank, world_size=512))

    watchdog.open()
    watchdog.mark_exited("the test is over")

    assert [beat.rank for beat in read_heartbeats(tmp_path)] == [0]


def test_a_rank_that_has_exited_records_why(watchdog: Watchdog, tmp_path: Path) -> None:
    watchdog.mark_exited("trained to the end")

    assert heartbeat_with(tmp_path).exit_reason == "trained to the end"


def test_a_dead_rank_is_named_and_recorded(watchdog: Watchdog, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    mine = heartbeat_with(tmp_path)
    write_heartbeat(tmp_path, replace(mine, rank=1, world_size=2, pid=ended.pid, step=5))

    watchdog._peers = Peers(near=(1,))
    error = watchdog.report_lost()

    assert re.search("rank 1 .* is dead; .* at step 5", str(error))
    ending = read_exit(tmp_path) or {}
    assert ending["code"] == RankLostError.exit_code


def test_a_rank_lost_before_the_start_records_nothing(tmp_path: Path, world: World) -> None:
    assert "before the run had started" in str(Watchdog(tmp_path, SECTION, world).report_lost())
    assert read_exit(tmp_path) is None


@pytest.mark.parametrize(
    ("rank", "code", "is_lost"),
    [(1, 51, True), (1, 1, True), (1, 75, False), (1, 0, False), (0, 1, False)],
)
def test_a_loss_or_failure_that_another_rank_has_recorded_ends_this_one(
    tmp_path: Path, world: World, rank: int, code: int, is_lost: bool
) -> None:
    watchdog = Watchdog(tmp_path, SECTION, world)
    watchdog.begin(None)
    watchdog._begin()
    record_start(tmp_path, step=0)
    watchdog.remember_folder()
    assert not watchdog._peer_is_lost()
    record_exit(tmp_path, code, "kind", "reason", rank, watchdog.fence.start_id)

    assert watchdog._peer_is_lost() is is_lost
    watchdog.let_peers_end()
    assert not watchdog._peer_is_lost()


def test_the_record_of_an_earlier_start_ends_no_rank(tmp_path: Path, world: World) -> None:
    record_exit(tmp_path, RankLostError.exit_code, "kind", "reason", 1, "0" * 12)
    watchdog = Watchdog(tmp_path, SECTION, world)
    watchdog.begin(None)
    watchdog._begin()
    watchdog.remember_folder()  # a cache of the network may still show the record

    assert not watchdog._peer_is_lost()


SUPERSEDED = """
import sys, time
from pathlib import Path
from megaback.config import HardwareSection
from megaback.distributed.world import World
from megaback.faults.peers import Peers
from megaback.faults.watchdog import Watchdog
class Alone(World):
    def run_collectively(self, function, *arguments):
        return function(*arguments)
    def of_first(self, value, kind):
        return value
run, call = Path(sys.argv[1]), sys.argv[2]
section = HardwareSection(heartbeat_s=0.1 if call == "beat" else 600)
older, newer = (Watchdog(run, section, Alone(0, 1, None, None)) for _ in range(2))
older.begin(None)
older.open()
newer.begin(None)
newer.open()
newer.mark_exited("trained to the end")
(run / "left").write_bytes((run / "heartbeats/rank-00000.json").read_bytes())
if call == "exit":
    older.record_exit(0, "finished", "trained to the end")
elif call == "mark":
    older.mark_exited("trained to the end")
elif call == "lost":
    older.report_lost()
time.sleep(600)
"""


@pytest.mark.parametrize("call", ["beat", "exit", "mark", "lost"])
def test_a_rank_of_an_older_start_ends_and_writes_nothing(tmp_path: Path, call: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUPERSEDED, tmp_path, call],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == SupersededError.exit_code, done.stderr
    assert done.stderr.count("a newer start of this run has begun on") == 1
    (beat,) = read_heartbeats(tmp_path)
    assert beat.exit_reason == "trained to the end"
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".start", "left", "rank-00000.json"}
    assert (tmp_path / "heartbeats/rank-00000.json").read_bytes() == (
        tmp_path / "left"
    ).read_bytes()


def test_a_start_whose_lock_was_taken_over_does_not_begin(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = take_lock(tmp_path / ".lock")
    assert lock is not None
    with lock, replace_lock(tmp_path / ".lock"), pytest.raises(CollectiveExit) as ending:
        Watchdog(tmp_path, SECTION, world).begin(lock)

    assert ending.value.code == SupersededError.exit_code
    assert not (tmp_path / ".start").exists()


STUCK = """
import sys, time
from pathlib import Path
from megaback.config import HardwareSection
from megaback.distributed.world import World
from megaback.faults.peers import Peers
from megaback.faults.watchdog import Watchdog
class Alone(World):
    def run_collectively(self, function, *arguments):
        return function(*arguments)
section = HardwareSection(heartbeat_s=0.1, collective_timeout_s=0.5, step_timeout_s=0.5)
watchdog = Watchdog(Path(sys.argv[1]), section, Alone(0, 1, None, None))
watchdog.open()
watchdog.set_phase("computing gradients", 3)
time.sleep(600)
"""


def test_a_phase_that_takes_too_long_ends_the_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == RankLostError.exit_code, done.stderr
    assert "was computing gradients at step 3" in done.stderr
