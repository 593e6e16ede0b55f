"""What every megaback command shares: how errors reach the user, and how files are replaced.

A command raises `MegabackError`; this module prints its sentence to stderr and exits with its code.
Errors of the operating system become one sentence too. Anything else is a defect of megaback and
keeps its traceback.
"""

import errno
import os
import subprocess
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from data_pipeline.errors import BackendError, MegabackError, StorageError

_OS_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "choose a path on a disk that can be written",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
}
_PROGRAM_ADVICE = {
    **dict.fromkeys(("cc", "gcc", "g++", "c++"), "install a C compiler (build-essential)"),
    **dict.fromkeys(
        ("sbatch", "scontrol", "srun", "sinfo", "squeue", "sacct", "scancel"),
        "run it where Slurm's commands are, on a login node or outside the container",
    ),
    "ssh": "install openssh-client",
    "ninja": "install ninja (pip install ninja)",
}


def storage_error(error: OSError) -> StorageError:
    """Turn an operating system error into one sentence that names the path."""
    where = f" {error.filename!r}" if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    advice = _OS_ADVICE.get(error.errno or 0, "check the path and the disk behind it")
    return StorageError(f"cannot read or write{where}: {reason}; {advice}")


def system_error(error: OSError) -> MegabackError:
    """One sentence for an error of the operating system: a missing program, or a disk's."""
    return _program_error(error) or storage_error(error)


def _program_error(error: OSError) -> BackendError | None:
    """The sentence for a program that could not be started; None for any other error.

    Both a missing file and a missing program are a FileNotFoundError. Whoever wanted the program
    (a compiler may be asked for deep within a library), it was `subprocess` that failed to start
    it: the error was raised there.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_code.co_filename != subprocess.__file__:
        return None
    if error.filename is None or Path(os.fsdecode(error.filename)).is_dir():
        return None
    program = Path(os.fsdecode(error.filename)).name
    if isinstance(error, FileNotFoundError):
        return BackendError(
            f"the program {program} is not on this machine (or not on the PATH), and this needs "
            f"it; {_PROGRAM_ADVICE.get(program, 'install it')}, then run the same command again"
        )
    return BackendError(
        f"the program {error.filename} cannot be started: {error.strerror}; make it executable, "
        "or install it again"
    )


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
            raise SystemExit(report(system_error(error))) from None


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
