"""Files of a folder that may be a stranger's: regular ones, not through links, of bounded size.

What is in the place of a file may be a pipe, at which whoever opens it waits for a writer; a
device, which never ends; or a symbolic link to a file of the user's, which would be written.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from data_pipeline.errors import OutputExistsError

UNFIT = (errno.EINVAL, errno.EFBIG)
"""Errors of a file that is there and is not a regular one, or is too large."""


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
    """Open a file of a work folder, but none elsewhere that a symbolic link there leads to.

    Raises OSError.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, mode, opener=lambda name, of_mode: os.open(name, of_mode | flags, 0o666))


def require_no_link(folder: Path, option: str = "`out`") -> None:
    """See that a work folder, which need not be there, lies where it seems to.

    Raises OutputExistsError.
    """
    if folder.is_symlink():
        raise OutputExistsError(
            f"{folder} is a symbolic link, and work files are written through none; remove the "
            f"link, or choose another {option}"
        )


def read_file(path: Path, max_bytes: int) -> bytes:
    """All of a file. Raises OSError, also where it has more bytes than that."""
    with open(open_file(path), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data = b"" if size_bytes > max_bytes else file.read(size_bytes)
        is_whole = size_bytes <= max_bytes and not file.read(1)
    if not is_whole:
        raise too_large(max_bytes, str(path))
    return data


def too_large(max_bytes: int, shown: str) -> OSError:
    """The error for a file that has more bytes than may be read."""
    return OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", shown)


def is_device(path: Path) -> bool:
    """Whether a path is there and is neither a file nor a folder: a device, a pipe, a socket."""
    return path.exists() and not path.is_file() and not path.is_dir()
