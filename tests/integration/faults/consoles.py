"""Where a run prints to: a file, a pipe, nobody at all, or a terminal that may be closed."""

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
"""Of each process with a terminal, the other end of that."""


def close_terminal(launcher: "subprocess.Popen[str]", _run: Path) -> None:
    """As a window that is closed, or a connection that ends: the kernel sends SIGHUP."""
    os.close(_terminals.pop(launcher.pid))


def _to_file(command: Sequence[Any], output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, **how)


def _to_pipe(command: Sequence[Any], output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    """Nothing reads it; it has room for all. Only errors go to the file."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        preexec_fn=hearing_ctrl_c,
        **how,
    )


def _to_nobody(command: Sequence[Any], _output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    """Standard output has lost its reader, and standard error is on a full disk."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, stdout=write_end, stderr=full, text=True, **how)
    os.close(write_end)
    return process


def _to_terminal(command: Sequence[Any], _output: IO[str], **how: Any) -> "subprocess.Popen[str]":
    """The process leads a session of its own, which this terminal controls."""
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
    "nobody": _to_nobody,
    "terminal": _to_terminal,
}
