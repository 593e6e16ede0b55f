"""Files and folders that appear under their names whole, or not at all.

What is being written lies beside its place under a hidden name of its own: `.NAME.ID.partial`.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{1,12}\.partial", re.DOTALL)
"""Shorter IDs are of earlier versions."""


def partial_name(name: str) -> str:
    """A name for what is to be renamed to `name`, which no other process has."""
    # Not the process's number, which another node may have given to a process of its own.
    return f".{name}.{uuid.uuid4().hex[:12]}.partial"


def whole_name(partial: str) -> str | None:
    """The name that a partial file was to get; None for any other file."""
    found = _PARTIAL.fullmatch(partial)
    return found[1] if found else None


@contextmanager
def replacing(
    path: Path, publish: Callable[[Path, Path], None] | None = None
) -> Iterator[IO[bytes]]:
    """Write a file of our own that appears under `path` whole, or not at all.

    Bytes go to a hidden neighbor, are flushed to the disk, and are renamed at the end. On any
    error the neighbor is removed and what stood at `path` stays. Two processes may write the same
    path: the last one to finish wins, and nobody sees a mixture. A symbolic link is replaced, never
    followed. What a user named is written by `writing_output` of output_paths.py, which renames by
    a `publish` of its own.
    """
    partial = path.with_name(partial_name(path.name))
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (publish or os.replace)(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk does not say where it is
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file of our own atomically, as UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_name(partial: Path, path: Path) -> None:
    """Rename a file. Raises FileExistsError, unlike a rename."""
    try:
        os.link(partial, path)
        partial.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(partial, path)
