"""Fence between the starts of a run: once a newer one has begun, an older one writes nothing more.

A rank that is cut off from the network survives its job, while the requeued job may already train
in the same folder. The file `.start` names the newest start. A rank reads it before it writes, and
at every heartbeat, and ends if it names a newer start than its own.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock

from data_pipeline.common.atomic import new_id, sync_folder, write_text
from data_pipeline.common.checked_json import made_from, read_json
from data_pipeline.common.command import report
from data_pipeline.errors import StorageError, SupersededError
from megaback.faults.run_records import Fields
from megaback.run_folder import START_NAME

_MAX_BYTES = 1 << 12
_ID = re.compile(r"[0-9a-f]{12}")
_FIELDS = Fields(counts=frozenset(("number",)), times=frozenset(("time",)))
_NUM_READS = 3
"""Number of tries: on NFS, a file that is replaced while it is read gives an error."""


@dataclass(frozen=True)
class Start:
    """A start of a run."""

    id: str
    number: int
    """One more than that of the start before: a cache may still show an older one."""
    host: str
    """Host of the first rank."""
    time: float
    """Time at which it began, in seconds since the epoch."""


def read_start(run: Path) -> Start | None:
    """The newest start of a run; None if it is unknown."""
    for _ in range(_NUM_READS):
        try:
            start = made_from(Start, read_json(run / START_NAME, _MAX_BYTES))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        except OSError:
            continue
        is_valid = _ID.fullmatch(start.id) and _FIELDS.problem(asdict(start)) is None
        return start if is_valid else None
    return None


def begin_start(run: Path, start_id: str | None = None) -> Start:
    """Record that a start of a run begins: the ranks of older ones then end. Raises OSError."""
    earlier = read_start(run)
    number = earlier.number + 1 if earlier is not None else 1
    start = Start(start_id or new_id(), number, socket.gethostname(), time.time())
    write_text(run / START_NAME, json.dumps(asdict(start)) + "\n")
    sync_folder(run)
    return start


class Fence:
    """Check of a rank whether its start is still the newest, before everything that it writes."""

    def __init__(self, start: Start | None, run: Path, folder: Callable[[], Path]) -> None:
        """Without a start, nothing is checked.

        `folder` finds the run's folder after a move, and raises StorageError if another run has
        taken its place.
        """
        self._start, self._run, self._folder = start, run, folder
        self._ending = Lock()

    @property
    def start_id(self) -> str | None:
        """The ID of the start."""
        return None if self._start is None else self._start.id

    def check(self) -> None:
        """Report and end this process, from any thread, if a newer start has begun."""
        error = self.problem()
        if error is not None:
            self._ending.acquire()  # never released: one thread reports
            report(error)
            os._exit(error.exit_code)

    def replace(self, partial: Path, path: Path) -> None:
        """Rename a written file to its final name, if no newer start has begun. Raises OSError."""
        if self.problem() is not None:
            partial.unlink(missing_ok=True)
        self.check()
        os.replace(partial, path)

    def problem(self) -> SupersededError | None:
        """The error if a newer start has begun."""
        own = self._start
        if own is None:
            return None
        newest = read_start(self._run)
        if newest is not None and newest.id == own.id:
            return None
        try:
            newest = read_start(self._folder())
        except StorageError:  # the run's folder is gone
            return None
        if newest is None or newest.id == own.id or newest.number < own.number:
            return None
        return superseded(newest)


def superseded(newest: Start | None) -> SupersededError:
    """The error of a start, and the newest one that has superseded it."""
    which = ""
    if newest is not None:
        began = datetime.fromtimestamp(newest.time).isoformat(" ", "seconds")
        which = f" on {newest.host} at {began}"
    return SupersededError(
        f"a newer start of this run has begun{which}; this one ended and wrote nothing more: "
        "`megaback watch RUN` shows the newer one"
    )


NO_FENCE = Fence(None, Path(), Path)
"""Fence of a writer outside of a training run."""
