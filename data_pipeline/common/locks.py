"""Advisory locks on files: the operating system gives them back when a process dies.

Where a file system has no locks (some network file systems), everyone gets every lock: what the
locks keep apart here is tidying up, never the writing of files.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
"""A link in the place of a lock would have a file made elsewhere, and a pipe keeps one waiting."""


@contextmanager
def locked(
    path: Path | str, *, shared: bool = False, wait: bool = True, folder: int | None = None
) -> Iterator[bool]:
    """Hold the lock of a file while the block runs; yields whether it was to be had.

    Many may share a lock at a time, one may hold it alone. Without `wait`, a lock that others hold
    is not waited for. With `folder`, a descriptor, the path is relative to it. Raises OSError when
    the file cannot be made.
    """
    if folder is None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, _FLAGS, 0o666, dir_fd=folder)
    try:
        operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError:
            held = True
        yield held
    finally:
        os.close(file)
