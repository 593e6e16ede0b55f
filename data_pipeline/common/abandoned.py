"""Partial outputs of killed processes: found by their names, and removed by the next command.

A writer holds a lock on its partial file or folder, which the operating system releases when the
process dies. What cannot be locked, on some network file systems, is kept.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.common.atomic import partial_name, whole_name
from data_pipeline.common.locks import try_lock

REPLACED_SUFFIX = ".replaced"
"""Suffix, in place of `.partial`, of an earlier folder while a new one takes its name."""
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_BEFORE_LOCK_S = 1.0
"""Maximum time between the creation of a partial file or folder and its lock."""


@contextmanager
def in_use(partial: Path) -> Iterator[None]:
    """Hold the lock of a partial file or folder that this process writes."""
    descriptor = os.open(partial, _FLAGS)
    try:
        try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(path: Path) -> bool:
    """Remove what killed processes left of an output; whether another process is writing it.

    An earlier folder whose replacement was killed gets its name back.
    """
    is_written = False
    with suppress(FileNotFoundError, NotADirectoryError):
        names = [other.name for other in path.parent.iterdir()]
        for partial in (path.with_name(name) for name in names if whole_name(name) == path.name):
            is_written |= _is_written(partial, path)
        if is_written:
            return True
        for name in names:
            stem = name.removesuffix(REPLACED_SUFFIX)
            if stem != name and whole_name(f"{stem}.partial") == path.name:
                _restore(path.with_name(name), path)
    return False


def discard(folder: Path, path: Path) -> None:
    """Remove a former or incomplete output folder, which becomes a partial one at once."""
    partial = path.with_name(partial_name(path.name))
    with suppress(OSError):
        folder.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


def _is_written(partial: Path, path: Path) -> bool:
    """Remove a partial file or folder unless its writer is alive, or may be."""
    try:
        descriptor = os.open(partial, _FLAGS)
    except OSError:  # gone meanwhile, or a link
        return False
    try:
        is_free = not _is_before_lock(partial) and try_lock(descriptor)
        if not is_free:
            return is_free is False
        if partial.is_dir():
            # A writer whose lock is not seen here fails then, instead of completing half a folder.
            discard(partial, path)
        else:
            partial.unlink()
    except OSError:  # gone meanwhile, or another user's
        return False
    finally:
        os.close(descriptor)
    return False


def _is_before_lock(partial: Path) -> bool:
    """Whether its writer may be about to lock it: it is empty and new."""
    facts = partial.stat()
    is_empty = not any(partial.iterdir()) if partial.is_dir() else facts.st_size == 0
    return is_empty and abs(time.time() - facts.st_mtime) < _BEFORE_LOCK_S


def _restore(replaced: Path, path: Path) -> None:
    with suppress(OSError):
        if not path.exists():
            replaced.rename(path)
            return
    discard(replaced, path)
