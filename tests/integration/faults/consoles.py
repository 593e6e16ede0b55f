"""Consoles of a run: a file, a pipe without a reader, or a terminal that may be closed."""

import fcntl
import os
import subprocess
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

from tests.helpers.interrupting import hearing_ctrl_c

_terminals: dict[int, int] = {}
"""Controlling end of each process's terminal."""


def close_terminal(launcher: "subprocess.Popen[str]", _run: Path) -> None:
    """Close the terminal, as a closed window or connection does: the kernel sends SIGHUP."""
    os.close(_terminals.pop(launcher.pid))


def _to_file(command: Sequence[Any], output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, **how)


def _to_pipe(command: Sequence[Any], output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    """A pipe that is never read but holds everything; only errors go to the file."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        preexec_fn=hearing_ctrl_c,
        **how,
    )


def _to_closed_pipe(
    command: Sequence[Any], _output: IO[str], **how: Any
) -> "subprocess.Popen[str]":
    """Standard output is a pipe without a reader, and standard error is on a full disk."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=write_end, stderr=full, text=True, **how)
    os.close(write_end)
    return process


def _to_terminal(command: Sequence[Any], _output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    """A terminal that controls the process's own session."""
    ours, theirs = os.openpty()

    def lead_session() -> None:
        hearing_ctrl_c()
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        text=True,
        preexec_fn=lead_session,
        **how,
    )
    os.close(theirs)
    _terminals[process.pid] = ours
    Thread(target=_read_all, args=(os.dup(ours), process.pid), daemon=True).start()
    return process


def _read_all(descriptor: int, pid: int) -> None:
    while pid in _terminals:
        with suppress(OSError):
            os.read(descriptor, 1 << 12)
    os.close(descriptor)


CONSOLES: dict[str, Callable[..., "subprocess.Popen[str]"]] = {
    "file": _to_file,
    "pipe": _to_pipe,
    "closed": _to_closed_pipe,
    "terminal": _to_terminal,
}
