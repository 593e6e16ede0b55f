"""The memory that processes here may have: the machine's, or what a container or a job is given.

Loads no torch.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def host_memory_bytes() -> int:
    """All of it, whoever uses it now."""
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def free_host_memory_bytes() -> int:
    """What nobody uses now, as far as the limits of a container or a job let it be had."""
    return min([psutil.virtual_memory().available, *cgroup_limits()])


def cgroup_limits(listing: Path = _CGROUPS, mounted: Path = _MOUNTED) -> list[int]:
    """The limits in bytes of this process's control groups (version 1 or 2) and those above.

    In a container the path that the kernel names may be one of outside: the top is looked at, too.
    """
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            found += _read(mounted, path, "memory.max")
        elif "memory" in controllers.split(","):
            found += _read(mounted / "memory", path, "memory.limit_in_bytes")
    return found


def _read(top: Path, path: str, name: str) -> Iterator[int]:
    folder = top / path.lstrip("/")
    for place in (folder, *folder.parents):
        if place.is_relative_to(top):
            try:
                text = (place / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdecimal():  # version 2 says `max` for none, version 1 a number beyond all
                yield int(text)
