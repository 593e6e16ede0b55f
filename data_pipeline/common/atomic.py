"""Atomic writes: files and folders appear under their final names only when complete.

Until then they have a hidden name in the same folder: `.NAME.ID.partial`.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{1,12}\.partial", re.DOTALL)
"""Names of partial files; earlier versions used shorter IDs."""


def new_id() -> str:
    """A random ID of 12 hexadecimal digits."""
    # Not the process ID, which a process on another node may have too.
    return uuid.uuid4().hex[:12]


def partial_name(name: str, writer: str | None = None) -> str:
    """A temporary name for a file that will be renamed to `name`.

    It is unique, or has the ID of a writer.
    """
    return f".{name}.{writer or new_id()}.partial"


def whole_name(partial: str) -> str | None:
    """The final name of a partial file; None for any other file."""
    found = _PARTIAL.fullmatch(partial)
    return found[1] if found else None


@contextmanager
def partial_file(
    path: Path, publish: Callable[[Path, Path], None] | None = None, writer: str | None = None
) -> Iterator[Path]:
    """Path of a partial file to write, which is renamed to `path` at the end.

    On any error it is removed and `path` is unchanged. `publish` renames it; `writer`: an ID for
    its name.
    """
    partial = path.with_name(partial_name(path.name, writer))
    try:
        yield partial
        (publish or os.replace)(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(partial)):
            error.filename = str(path)  # an error of a full disk names no path
        raise


@contextmanager
def replacing(
    path: Path, publish: Callable[[Path, Path], None] | None = None
) -> Iterator[IO[bytes]]:
    """Write one of megaback's files atomically.

    Bytes go to a hidden partial file, which is flushed to the disk and renamed at the end. On any
    error it is removed and `path` is unchanged. Of two processes that write the same path, the last
    to finish wins. A symbolic link is replaced, never followed. Paths that a user named are written
    by `writing_output` of output_paths.py, which renames with its own `publish`.
    """
    with partial_file(path, publish) as partial, partial.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str, publish: Callable[[Path, Path], None] | None = None) -> None:
    """Write one of megaback's small text files atomically, as UTF-8."""
    with replacing(path, publish) as file:
        file.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_name(partial: Path, path: Path) -> None:
    """Rename a file without replacing another. Raises FileExistsError."""
    try:
        os.link(partial, path)
        partial.unlink()
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(partial, path)
