"""Where a run's folder lies while it trains: a person may move it, or put another in its place.

A folder is the run's if its history has the run's start, or if it is the one that was opened:
either is enough, as histories can be edited, and some network file systems make up their inodes.
"""

import os
import weakref
from pathlib import Path

from data_pipeline.errors import StorageError
from megaback.faults.exit_record import newest_start, read_history


class RunPlace:
    """A run's folder, found again when it has been moved on this machine."""

    def __init__(self, run: Path) -> None:
        """Find the folder of a run that has just recorded its start. Raises OSError."""
        self._run, self._start = run, newest_start(run)
        self._number = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._number)

    def now(self) -> Path:
        """The folder as it lies now; where it was deleted, it is to be made again.

        Raises StorageError where another run has taken its place and it cannot be found.
        """
        if self._start is None or self._is_ours(self._run):
            return self._run
        moved = self._moved()
        if moved is not None:
            return moved
        if not read_history(self._run):
            return self._run
        raise StorageError(
            f"the run's folder {self._run} was removed while it trained, and another run has taken "
            "its place; nothing was written into that one: start this one again in a folder of "
            "its own"
        )

    def _moved(self) -> Path | None:
        """Where the folder that was opened is now, as far as this system tells."""
        try:
            path = Path(f"/proc/self/fd/{self._number}").readlink()
        except OSError:
            return None
        return path if self._is_ours(path) else None

    def _is_ours(self, folder: Path) -> bool:
        if self._start in read_history(folder):
            return True
        try:
            return os.path.samestat(folder.stat(), os.fstat(self._number))
        except OSError:
            return False
