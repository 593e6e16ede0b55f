"""What every megaback command shares: how errors reach the user, and how files are replaced.

A command raises `MegabackError`; this module prints its sentence to stderr and exits with its code.
Errors of the operating system become one sentence too. Anything else is a defect of megaback and
keeps its traceback.
"""

import errno
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from data_pipeline.errors import MegabackError, StorageError

_OS_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
}


def storage_error(error: OSError) -> StorageError:
    """Turn an operating system error into one sentence that names the path."""
    where = f" {error.filename!r}" if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    advice = _OS_ADVICE.get(error.errno or 0, "check the path and the disk behind it")
    return StorageError(f"cannot read or write{where}: {reason}; {advice}")


def report(error: MegabackError) -> int:
    """Print an error's sentence to stderr; return its exit code."""
    print(f"megaback: error: {error}", file=sys.stderr, flush=True)
    return error.exit_code


class Command(click.Command):
    """A click command that ends every `MegabackError` with its sentence and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MegabackError as error:
            raise SystemExit(report(error)) from None
        except BrokenPipeError:
            raise  # click ends the command quietly: the reader of our output went away
        except OSError as error:
            raise SystemExit(report(storage_error(error))) from None


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears under `path` whole, or not at all.

    Bytes go to a hidden neighbour, are flushed to the disk, and are renamed at the end. On any
    error the neighbour is removed and what stood at `path` stays. Two processes may write the same
    path: the last one to finish wins, and nobody sees a mixture.
    """
    # Not the process's number, which another node may have given to a process of its own.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a full disk does not say where it is
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically, as UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())
