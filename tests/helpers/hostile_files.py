"""What the tests of hostile files share: a bound on time and memory, and how files are mutated."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_BYTES = 1 << 30
_MAX_S = 2.0
"""Twice what is promised: the tests share their cores."""


@contextmanager
def bounded(max_s: float = _MAX_S) -> Iterator[None]:
    """Within, at most 1 GiB of memory more is to be had, and it takes no longer than so much.

    Time is that of this process: other processes make it no longer.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    started = time.process_time()
    try:
        yield
    finally:
        took_s = time.process_time() - started
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert took_s < max_s, f"it took {took_s:.1f} s"
