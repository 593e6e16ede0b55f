"""A fork for a test that changes settings of the process."""

import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable

_LIMIT_S = 240


def in_fork(work: Callable[[], None]) -> None:
    """Do some work in a fork. Raises AssertionError with its traceback."""
    gc.collect()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        # A finalizer of what the tests before have left could wait for a thread that is not here.
        gc.freeze()
        faulthandler.dump_traceback_later(_LIMIT_S - 5, file=writing)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LIMIT_S)
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 - the parent's frames must not run in a fork
            os.write(writing, traceback.format_exc().encode()[-60_000:])
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        report = file.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    assert not status, report or f"the fork ended with status {status}"
