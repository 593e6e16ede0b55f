"""Memory limit for libraries that read untrusted files.

In formats such as parquet, a few bytes can claim gigabytes in places that only their libraries see:
pages, dictionaries, repeated values. So the operating system enforces a budget, and the library's
failure becomes an error message. Linux counts all private memory of a process toward RLIMIT_DATA;
on other systems nothing is bounded.
"""

import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES

Item = TypeVar("Item")

BUDGET_PER_RECORD_BYTE = 24
"""Memory budget per byte of a record: with the default of --max-record-bytes or less, a process may
grow by 768 MiB."""
_PAGE_BYTES = resource.getpagesize()
_DATA_PAGES = 5
"""Index of the field in /proc/self/statm."""


class MemoryFence:
    """Budget of additional memory for the process, enforced while the fence is up."""

    def __init__(self, shown: str, max_record_bytes: int) -> None:
        """`shown`: address of the file, for messages."""
        self._shown = shown
        # Libraries need some memory for small records too, and may hang without it.
        longest = max(max_record_bytes, DEFAULT_MAX_RECORD_BYTES)
        self._budget_bytes = BUDGET_PER_RECORD_BYTE * longest
        self._limit_bytes = _data_bytes() + self._budget_bytes

    @contextmanager
    def up(self) -> Iterator[None]:
        """Raises SourceUnreadableError when the budget is exceeded."""
        try:
            with _LIMIT.set(self._limit_bytes):
                yield
        except MemoryError:
            raise self.error() from None

    def error(self) -> SourceUnreadableError:
        """The error for an exceeded budget."""
        return SourceUnreadableError(
            f"{self._shown}: reading it takes more than {self._budget_bytes >> 20:,} MiB of "
            "memory; write it again in smaller pieces (row groups, pages, batches), or raise "
            f"`max_record_bytes`; the limit is {BUDGET_PER_RECORD_BYTE} times that"
        )

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items of an iterable, with the fence up while it produces them."""
        iterator = iter(items)
        while True:
            with self.up():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class _Limit:
    """Limit of the process, set by the first of several threads and reset by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    @contextmanager
    def set(self, num_bytes: int) -> Iterator[None]:
        if sys.platform != "linux":
            yield
            return
        with self._lock:
            if not self._num_users:
                self._before = resource.getrlimit(resource.RLIMIT_DATA)
                ends = [end for end in self._before if end != resource.RLIM_INFINITY]
                lowest = min([num_bytes, *ends])
                resource.setrlimit(resource.RLIMIT_DATA, (lowest, self._before[1]))
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                if not self._num_users:
                    resource.setrlimit(resource.RLIMIT_DATA, self._before)


_LIMIT = _Limit()


def _data_bytes() -> int:
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_bytes().split()[_DATA_PAGES]) * _PAGE_BYTES


def count_arrow_memory() -> None:
    """Use the system's allocator in Arrow, whose own pool reserves 1 GiB in advance."""
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
