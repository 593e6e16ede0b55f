"""Default signal handling for child processes in tests of Ctrl-C."""

import signal


def hearing_ctrl_c() -> None:
    """For a new process: handle Ctrl-C even if the tests run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
