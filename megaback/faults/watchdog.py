"""Per-rank watchdog: writes heartbeats, and aborts when a phase times out or a peer is lost.

The ranks wait for each other in every step, and a rank inside a collective, NCCL's above all, may
not notice that a peer is lost. At every beat a thread checks the process of the next rank on its
host, on the first rank of a host also the heartbeat of the next host (`peers`), and whether another
rank has recorded a loss: a lost rank is found by its watcher, and then ends all ranks, for two or
three small reads per rank and beat. Frozen ranks are found by their heartbeats once a phase times
out.
"""

import os
import shlex
import socket
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, Thread, current_thread
from typing import IO, Any

import psutil

from data_pipeline.common.command import report
from data_pipeline.errors import DeviceMemoryError, MegabackError, RankLostError, StorageError
from megaback.config_operation import HardwareSection
from megaback.distributed.world import World
from megaback.faults.collective_record import write_collectives
from megaback.faults.exit_record import read_exit, record_exit
from megaback.faults.flight_recorder import dump_collectives
from megaback.faults.heartbeat import (
    Heartbeat,
    heartbeat_paths,
    missing_ranks,
    pid_namespace,
    read_heartbeat,
    write_heartbeat,
)
from megaback.faults.peers import Peers, SilenceWatch, peers_of
from megaback.faults.run_lock import owns_lock
from megaback.faults.run_place import RunPlace
from megaback.faults.start_fence import NO_FENCE, Fence, Start, begin_start, superseded
from megaback.run_folder import HEARTBEATS_FOLDER, heartbeat_path

_ONE_SIDED = (RankLostError.exit_code, MegabackError.exit_code, DeviceMemoryError.exit_code)
"""Exit codes of a rank that ends without an agreement of all ranks."""
_MIN_POLL_S = 0.2


class Watchdog:
    """Reports the phase of this rank, and ends the process when it takes too long."""

    def __init__(
        self, run: Path, section: HardwareSection, world: World, start_id: str | None = None
    ) -> None:
        """Create a watchdog that neither writes nor watches before `open`.

        `start_id`: the ID of this start, if the launcher has chosen it.
        """
        self._run, self._section, self._world = run, section, world
        self._chosen_id = start_id
        self.fence = NO_FENCE
        """Fence of this start, after `begin`."""
        self._place: RunPlace | None = None
        self._lock = Lock()
        self._reporting = Lock()
        self._stopped = Event()
        self._peers_may_end = False
        self._peers = Peers()
        limit_s = max(section.silence_timeout_s, 3 * section.heartbeat_s)
        self._silence = SilenceWatch(limit_s, section.heartbeat_s)
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
            pids=pid_namespace(),
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

    def begin(self, lock: IO[bytes] | None) -> None:
        """Record that this start begins, on the first rank, which has the lock. Collective.

        Ends all ranks if a newer start has taken the lock over.
        """
        start = self._world.run_collectively(self._begin_start, lock)
        start = self._world.of_first(start, Start | None)
        self.fence = Fence(start, self._run, self.folder)
        with self._lock:
            self._beat = replace(self._beat, start=self.fence.start_id)

    def open(self) -> None:
        """Start, in a run's folder that is ours. Collective: all ranks then have a heartbeat."""
        self._world.run_collectively(self._begin)
        if self._world.size > 1:
            hosts = self._world.gather(f"{self._beat.host} {self._beat.pids}", str)
            self._peers = peers_of(self._world.rank, hosts)
            neighbor = self._peers.neighbor
            beat = None if neighbor is None else self._heartbeat_of(self._run, neighbor)
            if beat is None or beat.is_gone is not False:  # it cannot be seen
                self._peers = replace(self._peers, neighbor=None)
        self._thread.start()

    def set_phase(self, phase: str, step: int) -> None:
        """Report the phase that this rank begins. Costs a microsecond."""
        with self._lock:
            self._beat = replace(self._beat, phase=phase, step=step, since=time.time())

    def use_step_timeout(self) -> None:
        """Use the shorter timeout of steps, once everything is compiled, open and connected."""
        with self._lock:
            self._beat = replace(self._beat, timeout_s=self._section.step_timeout_s)

    def let_peers_end(self) -> None:
        """Accept from now on that other ranks end: all have ended their training, or will."""
        self._peers_may_end = True

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
        self.fence.check()
        try:
            return record_exit(
                self.folder(), code, kind, reason, self._world.rank, self.fence.start_id
            )
        except StorageError:  # another run has taken the folder's place
            return True

    def report_lost(self, lost: str | None = None, *, has_timed_out: bool = False) -> RankLostError:
        """Record and report the ranks missing after a collective failed or timed out.

        `lost`: a description of a rank that is known to be lost. `has_timed_out`: whether this
        rank's phase has, so that the collective in which it waits is named.
        The process must exit then: of two threads that report, the second may wait for ever.
        """
        self._reporting.acquire()
        if not self.is_open:  # heartbeats in the run's folder are of an earlier start
            error = RankLostError(
                "another rank ended before the run had started; see the messages above, and run "
                "the same command again"
            )
            report(error)
            return error
        self.fence.check()
        folder = self._run
        try:
            folder = self.folder()
            ending = self._exit_of_another(folder)
            if ending is not None:
                lost = str(ending["reason"])
            waited = self._write_collectives(folder)
            reason = lost or self._wait_for_missing(folder) + (waited if has_timed_out else "")
        except StorageError as gone:  # the heartbeats are, too
            reason = f"a rank is lost, and {gone}"
        place = f" with {shlex.quote(f'run={folder}')}" if folder != self._run else ""
        error = RankLostError(
            f"{reason}; the other ranks stop, and the checkpoints are intact: run the same "
            f"command{place} to resume"
        )
        self.mark_exited("another rank was lost")
        if self.record_exit(error.exit_code, type(error).__name__, reason):
            report(error)  # only the first rank that records it
        return error

    def _begin_start(self, lock: IO[bytes] | None) -> Start | None:
        if not self._world.is_first:
            return None
        if lock is not None and not owns_lock(lock, self._run):
            raise superseded(None)
        return begin_start(self._run, self._chosen_id)

    def _begin(self) -> None:
        (self._run / HEARTBEATS_FOLDER).mkdir(exist_ok=True)
        write_heartbeat(self._run, self._beat, self.fence.replace)
        if self._world.is_first:
            # An earlier start may have had more ranks.
            own = {heartbeat_path(self._run, rank) for rank in range(self._world.size)}
            for path in heartbeat_paths(self._run):
                if path not in own:
                    path.unlink(missing_ok=True)

    def _write(self) -> bool:
        """Write the heartbeat; returns whether it was possible."""
        with self._lock:
            beat = self._beat = replace(self._beat, written=time.time())
        try:
            write_heartbeat(self.folder(), beat, self.fence.replace)
        except (OSError, StorageError):
            return False  # a full disk or a missing folder must not end a healthy run
        return True

    def _watch(self) -> None:
        while not self._stopped.wait(self._section.heartbeat_s):
            self.fence.check()
            has_written = self._write()
            with self._lock:
                beat = self._beat
            has_timed_out = time.time() - beat.since > beat.timeout_s
            silent = self._silent_peer(has_written)
            if has_timed_out or silent or self._peer_is_lost():
                if self._reporting.locked():  # by the main thread, which then exits
                    return
                error = self.report_lost(silent, has_timed_out=has_timed_out)
                os._exit(error.exit_code)

    def _write_collectives(self, folder: Path) -> str:
        """Write this rank's last collectives; returns the first that it waits in, for a message."""
        own = self._beat
        dumped = dump_collectives(
            rank=own.rank, world_size=own.world_size, start=self.fence.start_id
        )
        if dumped is None:
            return ""
        with suppress(OSError):
            write_collectives(folder, *dumped, self.fence.replace)
        record, _ = dumped
        if not record.waiting:
            return ""
        first = record.waiting[0]
        return f"; {own.name} waited in {first.name} for {record.time - first.since:.0f} s"

    def _silent_peer(self, has_written: bool) -> str | None:
        """Description of the watched rank of another host, if it counts as lost."""
        distant = self._peers.distant
        if distant is None or self._peers_may_end:
            return None
        try:
            beat = self._heartbeat_of(self.folder(), distant)
        except StorageError:
            return None
        with self._lock:
            own = self._beat
        if not self._silence.is_lost(beat, own, has_written, time.monotonic()):
            return None
        limit_s = f"{self._silence.limit_s:.0f} s"
        if beat is None:
            return f"rank {distant} has written no heartbeat for {limit_s}"
        return (
            f"{beat.name} has written no heartbeat for {limit_s}; it was at step {beat.step}, "
            f"{beat.phase}"
        )

    def _heartbeat_of(self, folder: Path, rank: int) -> Heartbeat | None:
        """A rank's heartbeat of this start."""
        beat = read_heartbeat(heartbeat_path(folder, rank))
        return beat if beat is not None and beat.start == self.fence.start_id else None

    def _peer_is_lost(self) -> bool:
        """Whether the neighbor has died without a reason, or another rank has recorded a loss."""
        if self._peers_may_end:
            return False
        try:
            folder = self.folder()
        except StorageError:
            return False
        if self._peers.neighbor is not None:
            beat = self._heartbeat_of(folder, self._peers.neighbor)
            if beat is not None and beat.exit_reason is None and beat.is_gone:
                return True
        return self._exit_of_another(folder) is not None

    def _exit_of_another(self, folder: Path) -> dict[str, Any] | None:
        """The record of another rank that has failed or lost a peer in this start."""
        ending = read_exit(folder)
        # A cache of NFS may still show that of an earlier start.
        is_ours = ending is not None and ending.get("start") == self.fence.start_id
        if not is_ours or ending is None or ending["code"] not in _ONE_SIDED:
            return None
        return ending if ending.get("rank") not in (None, self._world.rank) else None

    def _wait_for_missing(self, folder: Path) -> str:
        """Description of the missing ranks, once the heartbeats of dead ones are old enough.

        Each rank looks at few others: 512 ranks that read the heartbeats of all would keep a shared
        disk too busy for those that are still written.
        """
        give_up = time.time() + 4 * self._section.heartbeat_s
        near = self._peers.near
        first_seen: dict[tuple[int, float], float] = {}
        while True:
            ending = self._exit_of_another(folder)
            if ending is not None:
                return str(ending["reason"])
            found = [self._heartbeat_of(folder, rank) for rank in near]
            beats = [beat for beat in found if beat is not None]
            for place, beat in enumerate(beats):
                if beat.host != self._beat.host:  # whose clock may differ
                    seen = first_seen.setdefault((beat.rank, beat.written), time.time())
                    beats[place] = replace(beat, written=seen)
            missing = missing_ranks(beats, near)
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
            time.sleep(max(_MIN_POLL_S, self._section.heartbeat_s / 4))
