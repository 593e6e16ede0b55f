"""Per-rank watchdog: writes heartbeats, and aborts when a phase times out or a peer is lost.

The ranks wait for each other in every step. When one is gone, the others cannot know it from inside
a collective: a thread here sees that this rank's phase has taken too long, reads the heartbeats for
who is missing, and ends the process with a sentence.
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
        """Nothing is written or watched before `open`."""
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
        """Whether the run's folder is ours and says that the run has started."""
        return self._thread.ident is not None

    def remember_folder(self) -> None:
        """Know the run's folder again, by the start that it has just recorded."""
        self._place = RunPlace(self._run)

    def folder(self) -> Path:
        """The run's folder, wherever it lies now. Raises StorageError."""
        return self._run if self._place is None else self._place.now()

    def open(self) -> None:
        """Begin, in a run's folder that is ours. Collective: all ranks then have a heartbeat."""
        self._world.run_collectively(self._begin)
        self._thread.start()

    def set_phase(self, phase: str, step: int) -> None:
        """Report the phase that this rank begins. Costs a microsecond."""
        with self._lock:
            self._beat = replace(self._beat, phase=phase, step=step, since=time.time())

    def use_step_timeout(self) -> None:
        """From now on nothing takes long: everything was compiled, opened and connected."""
        with self._lock:
            self._beat = replace(self._beat, timeout_s=self._section.step_timeout_s)

    def mark_exited(self, reason: str) -> None:
        """Say why this rank ends, so that the others do not wait for it in vain."""
        self._stopped.set()
        if not self.is_open:
            return
        if current_thread() is not self._thread:
            self._thread.join(timeout=5)
        with self._lock:
            self._beat = replace(self._beat, exit_reason=reason)
        self._write()

    def record_exit(self, code: int, kind: str, reason: str) -> bool:
        """Note why the run ends, where its folder lies; False if another process has."""
        try:
            return record_exit(self.folder(), code, kind, reason, self._world.rank)
        except StorageError:  # another run's folder lies there
            return True

    def report_lost(self) -> RankLostError:
        """The ranks that are missing after a collective failed or timed out; records them."""
        if not self.is_open:  # what lies in the run's folder is of an earlier start
            error = RankLostError(
                "another rank ended before the run had started; see the messages above, and run "
                "the same command again"
            )
            report(error)
            return error
        reason = self._wait_for_missing()
        error = RankLostError(
            f"{reason}; the other ranks stop, and the checkpoints are intact: run the same command "
            "to go on"
        )
        self.mark_exited("another rank was lost")
        if self.record_exit(error.exit_code, type(error).__name__, reason):
            report(error)  # the first to know speaks for all
        return error

    def _begin(self) -> None:
        (self._run / HEARTBEATS_FOLDER).mkdir(exist_ok=True)
        write_heartbeat(self._run, self._beat)
        if self._world.is_first:
            for rank in range(self._world.size, self._world.size + 100_000):  # of a larger world
                path = heartbeat_path(self._run, rank)
                if not path.exists():
                    break
                path.unlink(missing_ok=True)

    def _write(self) -> None:
        with self._lock:
            beat = self._beat = replace(self._beat, written=time.time())
        # A full or slow disk, or a folder that is gone, must not end a run that is well.
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
        """Who is missing; heartbeats of the dead take a while to become old."""
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
                    "the disk may hang, or hardware.step_timeout_s be too short"
                )
            time.sleep(0.2)
