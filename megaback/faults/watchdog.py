"""Per-rank watchdog: writes heartbeats, and aborts when a phase times out or a peer is lost.

The ranks wait for each other in every step, and a rank inside a collective cannot notice that a
peer is lost: a thread notices that this rank's phase has timed out, finds the missing ranks by
their heartbeats, and ends the process with an error.
"""

import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread, current_thread

import psutil

from data_pipeline.common.command import report
from data_pipeline.errors import RankLostError, StorageError
from megaback.config import HardwareSection
from megaback.distributed.world import World
from megaback.faults.exit_record import record_exit
from megaback.faults.heartbeat import Heartbeat, missing_ranks, read_heartbeats, write_heartbeat
from megaback.faults.run_place import RunPlace
from megaback.run_folder import HEARTBEATS_FOLDER, heartbeat_path


class Watchdog:
    """Reports the phase of this rank, and ends the process when it takes too long."""

    def __init__(self, run: Path, section: HardwareSection, world: World) -> None:
        """Create a watchdog that neither writes nor watches before `open`."""
        self._run, self._section, self._world = run, section, world
        self._place: RunPlace | None = None
        self._lock = Lock()
        self._stopped = Event()
        now = time.time()
        process = psutil.Process()
        self._beat = Heartbeat(
            rank=world.rank,
            world_size=world.size,
            host=socket.gethostname(),
            pid=process.pid,
            pid_started=process.create_time(),
            phase="starting",
            step=0,
            since=now,
            written=now,
            interval_s=section.heartbeat_s,
            timeout_s=section.collective_timeout_s,
        )
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def is_open(self) -> bool:
        """Whether the run's folder is ours and records that the run has started."""
        return self._thread.ident is not None

    def remember_folder(self) -> None:
        """Remember the run's folder by the start that it has just recorded, to follow moves."""
        self._place = RunPlace(self._run)

    def folder(self) -> Path:
        """Current path of the run's folder. Raises StorageError."""
        return self._run if self._place is None else self._place.now()

    def open(self) -> None:
        """Start, in a run's folder that is ours. Collective: all ranks then have a heartbeat."""
        self._world.run_collectively(self._begin)
        self._thread.start()

    def set_phase(self, phase: str, step: int) -> None:
        """Report the phase that this rank begins. Costs a microsecond."""
        with self._lock:
            self._beat = replace(self._beat, phase=phase, step=step, since=time.time())

    def use_step_timeout(self) -> None:
        """Use the shorter timeout of steps, once everything is compiled, open and connected."""
        with self._lock:
            self._beat = replace(self._beat, timeout_s=self._section.step_timeout_s)

    def mark_exited(self, reason: str) -> None:
        """Record why this rank ends, so that the others do not wait for it."""
        self._stopped.set()
        if not self.is_open:
            return
        if current_thread() is not self._thread:
            self._thread.join(timeout=5)
        with self._lock:
            self._beat = replace(self._beat, exit_reason=reason)
        self._write()

    def record_exit(self, code: int, kind: str, reason: str) -> bool:
        """Record why the run ends, in its folder; False if another process already has."""
        try:
            return record_exit(self.folder(), code, kind, reason, self._world.rank)
        except StorageError:  # another run has taken the folder's place
            return True

    def report_lost(self) -> RankLostError:
        """Record and report the ranks missing after a collective failed or timed out."""
        if not self.is_open:  # heartbeats in the run's folder are of an earlier start
            error = RankLostError(
                "another rank ended before the run had started; see the messages above, and run "
                "the same command again"
            )
            report(error)
            return error
        reason = self._wait_for_missing()
        error = RankLostError(
            f"{reason}; the other ranks stop, and the checkpoints are intact: run the same command "
            "to resume"
        )
        self.mark_exited("another rank was lost")
        if self.record_exit(error.exit_code, type(error).__name__, reason):
            report(error)  # only the first rank that records it
        return error

    def _begin(self) -> None:
        (self._run / HEARTBEATS_FOLDER).mkdir(exist_ok=True)
        write_heartbeat(self._run, self._beat)
        if self._world.is_first:
            # An earlier start may have had more ranks.
            for rank in range(self._world.size, self._world.size + 100_000):
                path = heartbeat_path(self._run, rank)
                if not path.exists():
                    break
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        with self._lock:
            beat = self._beat = replace(self._beat, written=time.time())
        # A full disk or a missing folder must not end a healthy run.
        with suppress(OSError, StorageError):
            write_heartbeat(self.folder(), beat)

    def _watch(self) -> None:
        while not self._stopped.wait(self._section.heartbeat_s):
            self._write()
            with self._lock:
                beat = self._beat
            if time.time() - beat.since > beat.timeout_s:
                os._exit(self.report_lost().exit_code)

    def _wait_for_missing(self) -> str:
        """Description of the missing ranks, once the heartbeats of dead ones are old enough."""
        give_up = time.time() + 4 * self._section.heartbeat_s
        while True:
            missing = missing_ranks(read_heartbeats(self._run), self._world.size)
            missing.pop(self._world.rank, None)
            if missing:
                names = list(missing.values())
                more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
                return ", and ".join(names[:3]) + more
            if time.time() > give_up:
                with self._lock:
                    beat = self._beat
                return (
                    f"{beat.name} was {beat.phase} at step {beat.step} for "
                    f"{time.time() - beat.since:.0f} s, and every rank is alive; the network or "
                    "the disk may hang, or hardware.step_timeout_s may be too short"
                )
            time.sleep(0.2)
