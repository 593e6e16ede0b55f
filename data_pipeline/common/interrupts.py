"""Handling of Ctrl-C, SIGTERM and SIGHUP in the process of a command.

The first signal raises an exception, so that partial files and workers are cleaned up; the second
exits immediately. During imports the first one exits immediately too: there is nothing to clean up,
and libraries may swallow the exception. A signal that the process was started to ignore (`nohup`)
stays ignored.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_IMPORTER = "<frozen importlib._bootstrap>"
_Result = TypeVar("_Result")
_SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """This process received a signal to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    is_raising = False
    """Whether a command is running, which an exception ends."""
    received: int | None = None


def take_signals() -> None:
    """Install the signal handlers; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def received_signal() -> int | None:
    """The first signal received, or None."""
    return _State.received


def require_uninterrupted() -> None:
    """Raises Interrupted after a signal; for worker threads, which interrupts do not reach."""
    if _State.received is not None:
        raise Interrupted(_State.received)


@contextmanager
def at_work() -> Iterator[None]:
    """Raise Interrupted on a first signal while the block runs."""
    before, _State.is_raising = _State.is_raising, True
    try:
        yield
    finally:
        _State.is_raising = before


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer signals until the block ends.

    Processes started in the block have Ctrl-C blocked until `begin_child`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    ours = [number for number, handler in handlers.items() if callable(handler)]
    for number in ours:
        signal.signal(number, lambda *call: received.append(call))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number in ours:
            signal.signal(number, handlers[number])
        for received_number, frame in received:
            handler = handlers[signal.Signals(received_number)]
            assert callable(handler)
            handler(received_number, frame)


def begin_child() -> None:
    """In a worker process, ignore Ctrl-C: the parent process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def interruptible(function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    """Call a function that blocks in native code, and handle signals meanwhile.

    It runs in a daemon thread, which an interrupt abandons as the process ends.
    """
    from concurrent.futures import Future

    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 (raised by `result`)
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def interrupt_message(number: int, advice: str = "") -> str:
    """Message of a command ended by a signal."""
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"megaback: {how}{'; ' if advice else ''}{advice}"


def leave(code: int) -> NoReturn:
    """Exit without waiting for threads, after running the exit handlers."""
    # No public function does this: `sys.exit` first waits for threads, and one that hangs in a read
    # would block it.
    atexit._run_exitfuncs()  # handlers of libraries, such as `logging`
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _receive(number: int, frame: FrameType | None) -> None:
    is_first, _State.received = _State.received is None, _State.received or number
    if is_first and _State.is_raising and not _is_importing(frame):
        raise Interrupted(number)
    _end_at_once(number, "" if is_first else "second signal, exited immediately")


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTER:
            return True
        frame = frame.f_back
    return False


def _end_at_once(number: int, advice: str) -> NoReturn:
    text = f"{interrupt_message(number, advice)}\n".encode()
    with suppress(OSError):
        is_terminal = os.isatty(2)
        os.write(2, b"\n" + text + _SHOW_CURSOR if is_terminal else text)
    os._exit(128 + number)
