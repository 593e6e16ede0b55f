"""Path of a run's folder during training: a user may move it, or put another in its place.

A folder is the run's if its history has the run's start, or if it is the directory that was opened:
either suffices, since histories can be edited and some network file systems invent inodes.
"""

import os
import weakref
from pathlib import Path

from data_pipeline.errors import StorageError
from megaback.faults.exit_record import newest_start, read_history


class RunPlace:
    """A run's folder, found again after a move on this machine."""

    def __init__(self, run: Path) -> None:
        """Open the folder of a run that has just recorded its start. Raises OSError."""
        self._run, self._start = run, newest_start(run)
        self._number = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self._number)

    def now(self) -> Path:
        """Current path of the folder; the original path if it was deleted.

        Raises StorageError if another run has taken its place and it cannot be found.
        """
        if self._start is None or self._is_ours(self._run):
            return self._run
        moved = self._moved()
        if moved is not None:
            return moved
        if not read_history(self._run):
            return self._run
        raise StorageError(
            f"the run's folder {self._run} was removed during training and replaced by another "
            "run, which was not modified; start this run again in a folder of its own"
        )

    def _moved(self) -> Path | None:
        """Current path of the folder that was opened, if it still exists."""
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
