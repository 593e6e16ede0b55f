"""Bounds on time and memory of a program in an untrusted file, such as a chat template."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded_work(max_s: float, max_bytes: int) -> Iterator[None]:
    """Raise TimeoutError in the block after `max_s`, and MemoryError beyond `max_bytes`.

    Only the main thread has a time limit: Python handles signals in no other.
    """
    is_main = threading.current_thread() is threading.main_thread()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_bytes() + max_bytes, limits[1]))
    try:
        if not is_main:
            yield
            return
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, max_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _address_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * resource.getpagesize()


def _too_long(*_: object) -> None:
    raise TimeoutError("it takes too long")
