"""Host memory within the limits of a container or job (control groups). Loads no torch."""

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/proc/self/cgroup")
_MOUNTED = Path("/sys/fs/cgroup")


def host_memory_bytes() -> int:
    """Total host memory, used or free, within the limits of control groups."""
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def free_host_memory_bytes() -> int:
    """Available host memory, at most the limits of control groups."""
    return min([psutil.virtual_memory().available, *cgroup_limits()])


def cgroup_limits(listing: Path = _CGROUPS, mounted: Path = _MOUNTED) -> list[int]:
    """Limits in bytes of this process's control groups (version 1 or 2) and their ancestors.

    In a container, the kernel's path may be one of the host, so the root is read too.
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
            if text.isdecimal():  # without a limit: `max` in version 2, a huge number in version 1
                yield int(text)
