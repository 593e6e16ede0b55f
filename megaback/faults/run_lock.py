"""Lock of a run's folder, held while it is trained or rolled back.

The file names its holder while it is held, and is empty afterwards, so that a start that is refused
leaves it as it was. A requeued Slurm job takes the lock over from its own earlier start, of
which a rank may live on, cut off from the network; any other second start is refused.
"""

import atexit
import json
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from data_pipeline.common.checked_json import made_from, read_json
from data_pipeline.common.locks import is_lock_of, replace_lock, take_lock
from megaback.environment import slurm_job
from megaback.faults.run_records import Fields
from megaback.run_folder import LOCK_NAME

_MAX_BYTES = 1 << 12
_FIELDS = Fields(counts=frozenset(("restarts",)), times=frozenset(("time",)))


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a run's lock, or was killed while it did."""

    host: str
    time: float
    """Time at which it took the lock, in seconds since the epoch."""
    job: str | None
    """ID of its Slurm job."""
    restarts: int
    """Number of the job's restarts."""

    @property
    def name(self) -> str:
        """Host, time and job, for messages."""
        since = datetime.fromtimestamp(self.time).isoformat(" ", "seconds")
        job = f", job {self.job}" if self.job is not None else ""
        return f"{self.host} since {since}{job}"


def lock_run(run: Path) -> IO[bytes] | None:
    """Lock a run's existing folder until `release_lock`, or until the process exits.

    None if another process holds the lock. Raises OSError.
    """
    path = run / LOCK_NAME
    job, restarts = slurm_job()
    file = take_lock(path, wait=False)
    if file is None:
        holder = lock_holder(run)
        is_earlier = holder is not None and holder.job == job and holder.restarts < restarts
        if job is None or not is_earlier:
            return None
        file = replace_lock(path)
    holder = LockHolder(socket.gethostname(), time.time(), job, restarts)
    file.truncate(0)
    file.write(f"{json.dumps(asdict(holder))}\n".encode())
    file.flush()
    atexit.register(release_lock, file)
    return file


def release_lock(lock: IO[bytes]) -> None:
    """Empty a lock's file, which may be one that was taken over, and unlock it."""
    if not lock.closed:
        with lock:
            lock.truncate(0)


def owns_lock(lock: IO[bytes], run: Path) -> bool:
    """Whether a lock was not taken over."""
    return is_lock_of(lock, run / LOCK_NAME)


def lock_holder(run: Path) -> LockHolder | None:
    """The process that holds a run's lock, or was killed while it did; None if it is unknown."""
    try:
        holder = made_from(LockHolder, read_json(run / LOCK_NAME, _MAX_BYTES))
    except (OSError, ValueError, TypeError):
        return None
    return holder if _FIELDS.problem(asdict(holder)) is None else None
