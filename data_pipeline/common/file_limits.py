"""Limit of open files and sockets of this process."""

import resource
from contextlib import suppress

_SPARE_FILES = 4096


def raise_file_limit() -> None:
    """Raise the limit of open files as far as the system allows.

    The usual limit of 1,024 is for programs that call select(2), which none of ours does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, _SPARE_FILES)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
