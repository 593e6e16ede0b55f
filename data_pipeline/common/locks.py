"""Advisory file locks, which the operating system releases when a process dies.

On file systems without locks (some network file systems), every request succeeds. A lock is that of
the file at a path: `replace_lock` puts another file there, which is then the lock.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_pipeline.common.atomic import partial_name

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags that refuse links, which would create a file elsewhere, and do not block on pipes."""


def take_lock(
    path: Path | str, *, shared: bool = False, wait: bool = True, folder: int | None = None
) -> IO[bytes] | None:
    """Take a lock, held until the returned file is closed; None if it is taken and not `wait`.

    A lock is exclusive or `shared`. `folder`: descriptor to which the path is relative. Raises
    OSError when the file cannot be created.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = os.fdopen(os.open(path, _FLAGS, 0o666, dir_fd=folder), "wb")
        try:
            fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:
            pass  # a file system without locks
        except BaseException:  # a signal while waiting
            file.close()
            raise
        if is_lock_of(file, path, folder=folder):
            return file
        file.close()  # it was replaced or removed meanwhile


def try_lock(descriptor: int) -> bool | None:
    """Take the exclusive lock of an open file or folder, which is released when it is closed.

    False if another process has it, None on file systems without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_lock_of(file: IO[bytes], path: Path | str, *, folder: int | None = None) -> bool:
    """Whether a lock's file is still the one at the path."""
    try:
        facts = os.stat(path, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(facts, os.fstat(file.fileno()))


def replace_lock(path: Path) -> IO[bytes]:
    """Take a lock over from a holder that may never release it, held until the file is closed.

    Raises OSError.
    """
    partial = path.with_name(partial_name(path.name))
    file = take_lock(partial)
    assert file is not None
    try:
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        file.close()
        raise
    return file


@contextmanager
def locked(
    path: Path | str, *, shared: bool = False, wait: bool = True, folder: int | None = None
) -> Iterator[bool]:
    """Hold a lock while the block runs; yields whether it was acquired. See `take_lock`.

    Creates the lock file's folder if it is missing.
    """
    if folder is None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = take_lock(path, shared=shared, wait=wait, folder=folder)
    try:
        yield file is not None
    finally:
        if file is not None:
            file.close()
