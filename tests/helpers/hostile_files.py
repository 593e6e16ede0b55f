"""Bounds on time and memory for tests of hostile files."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAX_BYTES = 1 << 30
_MAX_S = 2.0
"""Twice the documented bound, as tests share their cores."""


@contextmanager
def bounded(max_s: float = _MAX_S) -> Iterator[None]:
    """Limit the block to 1 GiB of additional memory and `max_s` of this process's CPU time."""
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
