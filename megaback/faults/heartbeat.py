"""Heartbeats: what each rank is at, in `heartbeats/rank-00000.json` of the run's folder.

A thread of the rank writes it every few seconds, whatever the rank itself is doing or waiting for,
so that an old file means a rank that is dead, frozen or cut off, and a fresh one with an old
`since` a rank that is stuck. Read by the other ranks, and by `megaback watch`.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from data_pipeline.common.checked_json import made_from, read_json, require_within
from data_pipeline.common.number_ranges import MANY
from data_pipeline.common.regular_files import open_in_place
from megaback.faults.run_records import MAX_RECORD_BYTES, Fields
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
    """What a rank last said. Times are in seconds since the epoch, by its own clock."""

    rank: int
    world_size: int
    host: str
    pid: int
    pid_started: float
    """Time at which the process began: another one may be given its number later."""
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
    """Reason of its end, if it could still say so."""

    @property
    def is_gone(self) -> bool | None:
        """Whether its process no longer exists; None if it is another host's."""
        if self.host != socket.gethostname():
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
        """For people."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def write_heartbeat(run: Path, beat: Heartbeat) -> None:
    """Write it atomically, without waiting for the disk. Raises OSError."""
    path = heartbeat_path(run, beat.rank)
    partial = path.with_suffix(".partial")
    with open_in_place(partial, "wb") as file:
        file.write(json.dumps(asdict(beat)).encode())
    os.replace(partial, path)


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """The heartbeats of the newest start, by rank; what is no heartbeat is left out."""
    beats = []
    for path in sorted((run / HEARTBEATS_FOLDER).glob(f"{HEARTBEAT_PREFIX}*.json")):
        with suppress(OSError, ValueError, TypeError):
            beat = made_from(Heartbeat, read_json(path, MAX_RECORD_BYTES))
            require_within("world_size", beat.world_size, 1, int(MANY.max))
            require_within("rank", beat.rank, 0, beat.world_size - 1)
            require_within("pid", beat.pid, 0, _MAX_PID)
            if _FIELDS.problem(asdict(beat)) is None:
                beats.append(beat)
    return beats


def missing_ranks(
    beats: Sequence[Heartbeat], world_size: int, now: float | None = None
) -> dict[int, str]:
    """The ranks that have gone without a word or are silent, and how that is known.

    Ranks that left with a reason are not among them, unless there is nobody else to name.
    """
    now = time.time() if now is None else now
    missing = {
        rank: f"rank {rank} has never been heard of"
        for rank in sorted(set(range(world_size)) - {beat.rank for beat in beats})
    }
    for beat in beats:
        age_s = now - beat.written
        where = f"at step {beat.step}, {beat.phase}"
        if beat.exit_reason is not None:
            continue
        if beat.is_gone:
            missing[beat.rank] = f"{beat.name} is dead; it was last heard of {where}"
        elif age_s > 2.5 * beat.interval_s:
            missing[beat.rank] = f"{beat.name} has been silent for {age_s:.0f} s; it was {where}"
    if not missing:
        left = [beat for beat in beats if beat.exit_reason is not None]
        missing = {beat.rank: f"{beat.name} ended: {beat.exit_reason}" for beat in left}
    return missing
