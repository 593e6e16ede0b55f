"""Safe opening of files in untrusted folders: regular files only, of bounded size.

In place of a file there may be a pipe, which blocks until it has a writer; a device, which never
ends; or a symbolic link to one of the user's files, which would be overwritten.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from data_pipeline.errors import OutputExistsError

UNFIT = (errno.EINVAL, errno.EFBIG)
"""Errors of a file that is not regular or is too large."""


def open_file(path: Path) -> int:
    """A descriptor for reading a regular file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def open_in_place(path: Path, mode: str) -> IO[bytes]:
    """Open a file without following symbolic links. Raises OSError."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, mode, opener=lambda name, of_mode: os.open(name, of_mode | flags, 0o666))


def require_no_link(folder: Path, option: str = "`out`") -> None:
    """Raises OutputExistsError if a work folder is a symbolic link; it need not exist."""
    if folder.is_symlink():
        raise OutputExistsError(
            f"{folder} is a symbolic link, and work files are not written through links; remove "
            f"the link, or choose another {option}"
        )


def read_file(path: Path, max_bytes: int) -> bytes:
    """Contents of a file. Raises OSError, also if it is larger than `max_bytes`."""
    with open(open_file(path), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data = b"" if size_bytes > max_bytes else file.read(size_bytes)
        is_whole = size_bytes <= max_bytes and not file.read(1)
    if not is_whole:
        raise too_large(max_bytes, str(path))
    return data


def too_large(max_bytes: int, shown: str) -> OSError:
    """The error for a file larger than `max_bytes`."""
    return OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", shown)


def is_device(path: Path) -> bool:
    """Whether a path exists and is a device, pipe or socket."""
    return path.exists() and not path.is_file() and not path.is_dir()
