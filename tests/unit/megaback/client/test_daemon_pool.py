"""Threads that wait for a server, and do not keep a program from ending."""

import subprocess
import sys
import threading

import pytest

from megaback.client.daemon_pool import DaemonPool


def test_results_and_errors_are_those_of_the_calls() -> None:
    pool = DaemonPool(2)
    futures = [pool.submit(divmod, 7, number) for number in (2, 0, 3)]
    assert futures[0].result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        futures[1].result()
    assert futures[2].result() == (2, 1)
    pool.close()


def test_closing_cancels_what_has_not_begun_and_waits_for_nothing() -> None:
    pool = DaemonPool(1)
    has_begun, may_end = threading.Event(), threading.Event()

    def wait() -> bool:
        has_begun.set()
        return may_end.wait()

    running, waiting = pool.submit(wait), pool.submit(wait)
    assert has_begun.wait(60)
    pool.close()
    assert waiting.cancelled()
    assert not running.done()
    may_end.set()
    assert running.result(60)


def test_a_program_ends_while_a_call_waits() -> None:
    program = (
        "import threading\n"
        "from megaback.client.daemon_pool import DaemonPool\n"
        "DaemonPool(1).submit(threading.Event().wait)\n"
        "raise KeyboardInterrupt\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
