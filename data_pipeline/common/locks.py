"""Advisory locks on files: the operating system gives them back when a process dies.

Where a file system has no locks (some network file systems), everyone gets every lock.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
"""A link in the place of a lock would have a file made elsewhere, and a pipe keeps one waiting."""


def take_lock(
    path: Path | str, *, shared: bool = False, wait: bool = True, folder: int | None = None
) -> IO[bytes] | None:
    """A file whose lock is held until it is closed; None if others hold it, without `wait`.

    Many may share a lock at a time, one may hold it alone. With `folder`, a descriptor, the path is
    relative to it. Raises OSError when the file cannot be made.
    """
    file = os.fdopen(os.open(path, _FLAGS, 0o666, dir_fd=folder), "wb")
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # a file system without locks
    except BaseException:  # a signal while it waits
        file.close()
        raise
    return file


@contextmanager
def locked(
    path: Path | str, *, shared: bool = False, wait: bool = True, folder: int | None = None
) -> Iterator[bool]:
    """Hold a lock as `take_lock` does while the block runs; yields whether it was to be had.

    The file's folder is made where it is missing.
    """
    if folder is None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = take_lock(path, shared=shared, wait=wait, folder=folder)
    try:
        yield file is not None
    finally:
        if file is not None:
            file.close()
