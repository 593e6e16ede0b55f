"""Heartbeats: the phase of each rank, in `heartbeats/rank-00000.json` of the run's folder.

A thread of the rank writes one every few seconds, even while the rank itself is blocked: an old
file means that the rank is dead, frozen or cut off, and a fresh one with an old `since` that it is
stuck. The other ranks and `megaback watch` read them.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from data_pipeline.common.checked_json import made_from, read_json, require_within
from data_pipeline.common.number_ranges import MANY
from data_pipeline.common.regular_files import open_in_place
from megaback.faults.run_records import MAX_RECORD_BYTES, Fields
from megaback.faults.start_fence import read_start
from megaback.run_folder import HEARTBEAT_PREFIX, HEARTBEATS_FOLDER, heartbeat_path

_FIELDS = Fields(
    counts=frozenset(("step",)),
    numbers=frozenset(("interval_s", "timeout_s")),
    times=frozenset(("pid_started", "since", "written")),
)
_MAX_PID = 1 << 22
"""Maximum process id of Linux."""


@dataclass(frozen=True)
class Heartbeat:
    """Last report of a rank. Times are in seconds since the epoch, by its host's clock."""

    rank: int
    world_size: int
    host: str
    pid: int
    pid_started: float
    """Time at which the process began: process ids are reused."""
    phase: str
    """Phase that the rank is in."""
    step: int
    since: float
    """Time at which the phase began."""
    written: float
    interval_s: float
    timeout_s: float
    """Timeout of the phase, in seconds."""
    exit_reason: str | None = None
    """Reason of its end, if it could record one."""
    start: str | None = None
    """ID of the start that it belongs to."""
    pids: str | None = None
    """Namespace of its process id: a container on the same host may have another."""

    @property
    def is_gone(self) -> bool | None:
        """Whether its process no longer exists; None if unknown, as on another host."""
        if self.host != socket.gethostname() or self.pids not in (None, pid_namespace()):
            return None
        try:
            process = psutil.Process(self.pid)
            return (
                abs(process.create_time() - self.pid_started) > 1
                or process.status() == psutil.STATUS_ZOMBIE
            )
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return None

    @property
    def name(self) -> str:
        """Rank, host and process id, for messages."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@cache
def pid_namespace() -> str | None:
    """Namespace of this machine's process ids; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def write_heartbeat(
    run: Path, beat: Heartbeat, publish: Callable[[Path, Path], None] = os.replace
) -> None:
    """Write a heartbeat atomically, without fsync; `publish` renames it. Raises OSError."""
    path = heartbeat_path(run, beat.rank)
    # Ranks of two starts must not write the same partial file.
    partial = path.with_suffix(f".{beat.start}.partial" if beat.start else ".partial")
    with open_in_place(partial, "wb") as file:
        file.write(json.dumps(asdict(beat)).encode())
    publish(partial, path)


def heartbeat_paths(run: Path) -> list[Path]:
    """Paths of all heartbeats of a run, in order of rank."""
    return sorted((run / HEARTBEATS_FOLDER).glob(f"{HEARTBEAT_PREFIX}*.json"))


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """The heartbeats of the newest start, by rank; invalid files are skipped."""
    newest = read_start(run)
    start = newest.id if newest is not None else None
    beats = map(read_heartbeat, heartbeat_paths(run))
    return [beat for beat in beats if beat is not None and beat.start == start]


def read_heartbeat(path: Path) -> Heartbeat | None:
    """A rank's heartbeat; None if the file is missing or invalid."""
    with suppress(OSError, ValueError, TypeError):
        beat = made_from(Heartbeat, read_json(path, MAX_RECORD_BYTES))
        require_within("world_size", beat.world_size, 1, int(MANY.max))
        require_within("rank", beat.rank, 0, beat.world_size - 1)
        require_within("pid", beat.pid, 0, _MAX_PID)
        if _FIELDS.problem(asdict(beat)) is None:
            return beat
    return None


def missing_ranks(
    beats: Sequence[Heartbeat], ranks: Collection[int], now: float | None = None
) -> dict[int, str]:
    """Ranks, of these, that died without a reason or are silent, with a description of each.

    Ranks that ended with a reason are included only if no other is missing.
    """
    now = time.time() if now is None else now
    missing = {
        rank: f"rank {rank} has written no heartbeat"
        for rank in sorted(set(ranks) - {beat.rank for beat in beats})
    }
    for beat in beats:
        age_s = now - beat.written
        where = f"at step {beat.step}, {beat.phase}"
        if beat.exit_reason is not None:
            continue
        if beat.is_gone:
            missing[beat.rank] = f"{beat.name} is dead; its last heartbeat was {where}"
        elif age_s > 2.5 * beat.interval_s:
            missing[beat.rank] = (
                f"{beat.name} has written no heartbeat for {age_s:.0f} s; it was {where}"
            )
    if not missing:
        left = [beat for beat in beats if beat.exit_reason is not None]
        missing = {beat.rank: f"{beat.name} ended: {beat.exit_reason}" for beat in left}
    return missing
