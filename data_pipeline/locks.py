"""Advisory locks on files: the operating system gives them back when a process dies.

Where a file system has no locks (some network file systems), everyone gets every lock: what the
locks keep apart here is tidying up, never the writing of files.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file while the block runs; yields whether it was to be had.

    Many may share a lock at a time, one may hold it alone. Without `wait`, a lock that others hold
    is not waited for. Raises OSError when the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, operation if wait else operation | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError:
            held = True
        yield held
