"""Ctrl-C, SIGTERM and SIGHUP, for the process of a command.

The first one ends the command by an exception, so that half-written files and workers go; the next
one ends the process at once. While modules are being imported there is nothing to tidy up, and
libraries turn an exception into others or lose it: then the first one, too, ends the process.
A signal that this process was started to ignore (`nohup`) stays ignored.
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
    """This process was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    is_raising = False
    """Whether a command is at work, which an exception ends."""
    received: int | None = None


def take_signals() -> None:
    """From now on, signals end this process in order. Only the main thread can ask for this."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def received_signal() -> int | None:
    """The signal by which this process was asked to end."""
    return _State.received


def require_uninterrupted() -> None:
    """In a thread that works, where an interrupt does not reach it: end as the command does."""
    if _State.received is not None:
        raise Interrupted(_State.received)


@contextmanager
def at_work() -> Iterator[None]:
    """While the block runs, a first signal raises Interrupted."""
    before, _State.is_raising = _State.is_raising, True
    try:
        yield
    finally:
        _State.is_raising = before


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals that come while the block runs are obeyed after it: it is done, or not begun.

    What the block starts does not hear of Ctrl-C until it asks to (`begin_child`).
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
    """In a worker: Ctrl-C is for the process that started this one, and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def interruptible(function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
    """Call what works for long without returning to Python, and hear signals meanwhile.

    It runs in another thread, which an interrupt leaves behind: the process ends.
    """
    from concurrent.futures import Future

    done: Future[_Result] = Future()

    def run() -> None:
        try:
            done.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 (raised where the result is wanted)
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result()


def sentence(number: int, advice: str = "") -> str:
    """What a command says that was asked to end."""
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    return f"megaback: {how}{'; ' if advice else ''}{advice}"


def leave(code: int) -> NoReturn:
    """End this process without waiting for its threads; what was to run at its exit runs."""
    # No public call does this: `sys.exit` runs the handlers too, but first waits for threads (one
    # that hangs in a read would hold the process), and then takes the interpreter down.
    atexit._run_exitfuncs()  # of libraries, `logging` among them
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _receive(number: int, frame: FrameType | None) -> None:
    is_first, _State.received = _State.received is None, _State.received or number
    if is_first and _State.is_raising and not _is_importing(frame):
        raise Interrupted(number)
    _end_at_once(number, "" if is_first else "a second time: ended at once")


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTER:
            return True
        frame = frame.f_back
    return False


def _end_at_once(number: int, advice: str) -> NoReturn:
    text = f"{sentence(number, advice)}\n".encode()
    with suppress(OSError):
        is_terminal = os.isatty(2)
        os.write(2, b"\n" + text + _SHOW_CURSOR if is_terminal else text)
    os._exit(128 + number)
